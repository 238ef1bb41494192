"""Measures which share of random small mutations of the package the default tests detect.

    python tools/mutation.py results.json > report.md

Needs the extra `dev`. The mutations are Cosmic Ray's: `<` becomes `<=`, 3 becomes 4, a decorator is removed.
A position is drawn first, then one of its mutations; otherwise arithmetic operators, which have eleven each,
would dominate the sample. Annotations (except calls in them: `Range(1, 9)` is data), type aliases and code
for type checkers are excluded. All other mutations count, equivalent ones too.

The default tests run once under coverage, to record which tests execute which lines, also in the commands
that they start. Each mutation is then made in a copy of the checkout. Only the tests that execute its lines
run, the fastest first, as many as fit into --budget. For a line outside of functions these are the tests of
its module's functions; for a line that no test executes, those of the module's name and of the command line.
A time-out counts as detected.

Ctrl-C loses nothing: the same command resumes from the results file and the folder beside it. With a higher
--budget it runs, for each survivor, the tests that had been skipped.
"""

import ast
import bisect
import difflib
import hashlib
import itertools
import json
import random
import re
import shutil
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from mutation_tests import PACKAGES, ROOT, end_all, file_of, measure, own_files, run_tests, tests_of


class Mutation(NamedTuple):
    name: str  # file:line:column operator
    file: str
    line: int
    source: str  # of the whole file, before and after
    changed: str


def draw(size: int, seed: int) -> list[Mutation]:
    """Mutations at `size` random positions, each of which changes the program."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    needless = ("core/NoOp", "core/VariableReplacer", "core/VariableInserter")  # or need names of variables
    operators = {name: get_operator(name)() for name in operator_names() if name not in needless}
    sources = {f: (ROOT / f).read_text(encoding="utf-8") for f in own_files(*PACKAGES) if f.endswith(".py")}
    places = defaultdict(list)
    for file, source in sources.items():
        nodes = list(ast_nodes(get_ast(source)))
        for name, operator in operators.items():
            starts = [start for node in nodes for start, _ in operator.mutation_positions(node)]
            for nth, start in enumerate(starts):
                places[file, start, name.partition("_")[0]].append((name, nth))
    chance = random.Random(seed)
    sample: list[Mutation] = []
    for place in chance.sample(sorted(places), len(places)):
        (file, (line, column), _), (name, nth) = place, chance.choice(places[place])
        with suppress(AttributeError, SyntaxError):  # Cosmic Ray cannot mutation all kinds of `except a.B`
            changed = mutate_code(sources[file], operators[name], nth)
            if meaning(changed) != meaning(sources[file]):
                title = f"{file}:{line}:{column + 1} {name.rpartition('/')[2]}"
                sample.append(Mutation(title, file, line, sources[file], changed))
        if len(sample) == size:
            break
    return sample


def meaning(source: str) -> str:
    """The syntax tree without what only type checkers read."""

    def calls(hint: ast.expr) -> ast.expr:
        return ast.Tuple([node for node in ast.walk(hint) if isinstance(node, ast.Call)], ast.Load())

    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = calls(node.annotation)
        elif isinstance(node, ast.Assign) and re.match(r"[A-Z]\w+\[", ast.unparse(node.value)):
            node.value = calls(node.value)  # an alias such as Answers = Iterator[int | str]
    return ast.dump(tree)


def prepare(work: Path, code: str) -> dict[str, Any]:
    """Copy the checkout to `work`/base and measure its tests there, unless that was done before."""
    kept = work / "base.json"
    if kept.exists() and (base := json.loads(kept.read_text()))["code"] == code:
        return dict(base)
    shutil.rmtree(work, ignore_errors=True)
    for file in own_files(""):
        (work / "base" / "checkout" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, work / "base" / "checkout" / file)
    kept.write_text(json.dumps(base := measure(work) | {"code": code}))
    return base


def try_mutation(mutation: Mutation, passed: int, work: Path, base: Any, given: Namespace) -> dict[str, Any]:
    """Run the tests of a mutation in a copy of `work`/base, except the first ones, which passed before."""
    tests, seen = tests_of(mutation.file, mutation.source, mutation.line, base)
    tests = [test for test in tests if not re.search(given.without, test)]
    costs = list(itertools.accumulate(base["seconds"][test] for test in tests))
    chosen = tests[passed : max(passed + 1, bisect.bisect(costs, given.budget))]
    files = list(dict.fromkeys(file_of(test) for test in chosen))
    chosen.sort(key=lambda test: files.index(file_of(test)))  # tests of a file share fixtures
    folder = Path(tempfile.mkdtemp(dir=work))
    for part in ("checkout", "cache"):
        shutil.copytree(work / "base" / part, folder / part)
    (folder / "checkout" / mutation.file).write_text(mutation.changed, encoding="utf-8")
    (folder / "chosen.json").write_text(json.dumps([chosen, list(base["seconds"])]))
    began, told = time.monotonic(), {"MUTATION_CHOSEN": str(folder / "chosen.json")}
    code, output = run_tests(folder, 90 + 3 * given.budget, "-x", "--timeout=90", *files, **told)
    shutil.rmtree(folder, ignore_errors=True)
    lines, late = output.splitlines(), code is None or "Failed: Timeout (>" in output
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))]
    return {
        "outcome": "timed out" if late else "survived" if code in (0, 5) else "detected",
        "by": failed[-1:] + failed[:1] or lines[-1:] if code else [],
        "seconds": round(time.monotonic() - began, 1),
        "tests": passed + len(chosen),
        "left_out": len(tests) - passed - len(chosen),
        "seen": seen,
        "budget": given.budget,
    }


def report(sample: list[Mutation], results: dict[str, Any]) -> Iterator[str]:
    found = {mutation: results[mutation.name] for mutation in sample if mutation.name in results}
    survivors = {mutation: result for mutation, result in found.items() if result["outcome"] == "survived"}
    late = sum(result["outcome"] == "timed out" for result in found.values())
    cut = sum(result["left_out"] > 0 for result in survivors.values())
    unseen = sum(not result["seen"] for result in survivors.values())
    share = f"{len(found) - len(survivors)} of {len(found)}, {1 - len(survivors) / len(found):.1%}"
    yield f"The tests detected {share} of the mutations, {late} of them by a time-out."
    yield f"{len(survivors)} survived: {cut} with tests left to run, {unseen} on lines that no test executes."
    for mutation, result in survivors.items():
        yield f"\n## {mutation.name}\n\n{result['tests']} tests run, {result['left_out']} left out\n\n```diff"
        lines = mutation.source.splitlines(), mutation.changed.splitlines()
        yield from difflib.unified_diff(*lines, mutation.file, mutation.file, n=2, lineterm="")
        yield "```"


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("results", type=Path, help="a JSON file, created or resumed")
    add("--sample", type=int, default=150, help="number of mutations (150)")
    add("--seed", type=int, default=0, help="seed of the sample (0)")
    add("--budget", type=float, default=60, help="seconds of tests for each, as timed with coverage (60)")
    add("--without", default="^$", help="tests to skip (regular expression), such as those of a clock")
    add("--jobs", type=int, default=2, help="mutations tested at a time (2)")
    given = parser.parse_args()
    work = given.results.absolute().with_suffix(".d")
    tested = [(ROOT / file).read_bytes() for file in own_files(*PACKAGES, "conf/", "tests/")]
    code, sample = hashlib.sha256(b"".join(tested)).hexdigest(), draw(given.sample, given.seed)
    kept: dict[str, Any] = {"code": code, "results": {}}
    if given.results.exists() and (kept := json.loads(given.results.read_text()))["code"] != code:
        parser.error(f"{given.results} belongs to other code; choose another file")
    base, results = prepare(work, code), kept["results"]
    same = sample[0]._replace(line=1, changed=sample[0].source)
    if not results and (control := try_mutation(same, 0, work, base, given))["outcome"] != "survived":
        sys.exit(f"tests fail without any mutation: {control}")
    cut = {n: r for n, r in results.items() if r["outcome"] == "survived" and r["left_out"]}
    again = {name: r["tests"] for name, r in cut.items() if r["budget"] < given.budget}
    waiting = [mutation for mutation in sample if mutation.name not in results or mutation.name in again]
    with ThreadPoolExecutor(given.jobs) as pool:
        running = {pool.submit(try_mutation, c, again.get(c.name, 0), work, base, given): c for c in waiting}
        try:
            for number, future in enumerate(as_completed(running), 1):
                name = running[future].name
                result = results[name] = future.result()
                given.results.write_text(json.dumps(kept, indent=1))
                told = f"{number}/{len(waiting)} {result['outcome']} in {result['seconds']} s: {name}"
                print(told, *result["by"], sep="  ", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in running):
                end_all(work)
                time.sleep(0.2)
            raise
    print(*report(sample, results), sep="\n")


if __name__ == "__main__":
    main()
