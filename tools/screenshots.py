"""Takes the screenshots of README.md and docs/, with the real commands and a real browser.

python -m tools.screenshots [--folder outputs/screenshots] [--to docs/images] [KEY=VALUE...]

It needs Debian's chromium and the extra `test`. The sweep is trained only once; later calls only take the
screenshots. KEY=VALUE overrides the sweep, for a quick test.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, ViewportSize, sync_playwright

SWEEP = ("lr=0.1,0.5,0.9", "model=lenet,lenet_relu_max", "seed=range(3)")
SIZE: ViewportSize = {"width": 1400, "height": 1250}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--folder", type=Path, default=Path("outputs") / "screenshots")
    parser.add_argument("--to", type=Path, default=Path("docs") / "images")
    chosen = parser.parse_intermixed_args()
    os.environ.setdefault("LENET_SWEEP_DATA", str(Path("data").absolute()))
    chosen.folder.mkdir(parents=True, exist_ok=True)
    chosen.to.mkdir(parents=True, exist_ok=True)
    _command(chosen.folder, *SWEEP, *chosen.overrides, "-m")
    sweep = max((chosen.folder / "outputs" / "sweeps").glob("*/report.html")).parent
    with _tab() as tab:
        for scheme in ("light", "dark"):
            tab.emulate_media(color_scheme=scheme)
            tab.goto((sweep / "report.html").absolute().as_uri())
            tab.locator(".main-svg").first.wait_for()
            tab.screenshot(path=chosen.to / f"report_{scheme}.png")
        tab.emulate_media(color_scheme="light")
        with _pages(chosen.folder) as address:
            _saved_view(tab, address, chosen.to / "saved_view.png")
    best = max((sweep / str(n) for n in range(len(list(sweep.glob("[0-9]*"))))), key=_accuracy)
    for picture in ("activations", "filters", "mistakes"):
        shutil.copyfile(best / "plots" / f"{picture}.png", chosen.to / f"{picture}.png")
    ood = (chosen.to / "ood.png").absolute()
    _command(chosen.folder, "predict", str(best.relative_to(chosen.folder)), "--ood", str(ood))


def _accuracy(run: Path) -> float:
    from lenet_sweep.storage.result import read_result

    result = read_result(run)
    return result.metrics["test/acc"] if result else 0.0


@contextmanager
def _tab() -> Iterator[Page]:
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser.new_page(viewport=SIZE, device_scale_factor=1)
        browser.close()


@contextmanager
def _pages(folder: Path) -> Iterator[str]:
    """The address of the saved view, as printed by `ui`."""
    command = [sys.executable, "-u", "-m", "lenet_sweep", "ui", "--no-browser"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            address = next((line.strip() for line in process.stdout if line.startswith("http")), None)
            if address is None:
                raise SystemExit("MLflow's server did not start")
            yield address
        finally:
            process.terminate()


def _saved_view(tab: Page, address: str, path: Path) -> None:
    tab.goto(address)
    tab.get_by_text("matching runs").wait_for()
    # Close the panel that MLflow opens next to the runs.
    tab.get_by_text("MLflow Assistant").locator("xpath=ancestor::*[.//button][1]//button").last.click()
    tab.locator("path.js-line").nth(3).wait_for(state="attached")
    tab.wait_for_timeout(3_000)  # the charts are drawn one after the other
    tab.screenshot(path=path)


def _command(folder: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "lenet_sweep", *arguments], cwd=folder, check=True)


if __name__ == "__main__":
    main()
