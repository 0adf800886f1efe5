"""Seconds that `transfer report --html` takes over many runs, and how long a browser takes to show them.

    transfer run -m method=source_only,dann,deep_coral,mcc trainer.steps=200
    python benchmarks/html_report_speed.py outputs/runs --runs 1000

The runs below the folder are repeated with other seeds until there are as many as asked: their large files are linked, their
settings and figures rewritten. Each command runs in a process of its own, its imports included. The browser's figures need
playwright and chromium, and are left out without them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WRITTEN = ("config.yaml", "result.json", "status.json", "manifest.json")
LINKED = ("metrics.jsonl", "predictions.npz", "features.npz", "examples.npz", "run.log")


def multiply(source: Path, folder: Path, count: int) -> None:
    runs = sorted(path.parent for path in source.rglob("result.json"))
    for i, run in zip(range(count), itertools.cycle(runs), strict=False):
        seed, pair = 1000 * (i // len(runs)), run.parent.name
        path = folder / pair / f"{run.name}{i:06x}"
        path.mkdir(parents=True)
        for name in WRITTEN:
            text = (run / name).read_text()
            if name == "config.yaml":
                own = re.findall(r"^seed: (\d+)$", text, re.MULTILINE)[0]
                text = text.replace(f"\nseed: {own}\n", f"\nseed: {int(own) + seed}\n")
            elif name == "result.json":
                content = json.loads(text)
                text = json.dumps(content | {"seed": content["seed"] + seed}, indent=2)
            (path / name).write_text(text)
        for name in LINKED:
            if (run / name).exists():
                os.link(run / name, path / name)


def measured(arguments: list[str]) -> tuple[float, float]:
    """Seconds of wall clock, and of processors with their children."""
    before, began = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-m", "transfer_cli", "report", *arguments], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - began, os.times()
    return wall, after.children_user + after.children_system - before.children_user - before.children_system


def in_a_browser(page: Path) -> dict[str, float]:
    """Seconds until the table and the list are there, of a filter, and of a run's page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page()
        began = time.perf_counter()
        tab.goto(page.as_uri())
        opened = time.perf_counter() - began
        script = """() => { const t = performance.now(); const f = document.querySelector('#filters');
            f.elements.method.selectedIndex = 2; f.dispatchEvent(new Event('input')); document.body.offsetHeight;
            return (performance.now() - t) / 1000; }"""
        filtered = tab.evaluate(script)
        began = time.perf_counter()
        tab.locator("table.runs a").first.click()
        tab.wait_for_selector("#page[data-ready]")
        run = time.perf_counter() - began
        browser.close()
    return {"browser: opened": opened, "browser: filtered": filtered, "browser: a run's page": run}


def size(path: Path) -> str:
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return f"{sum(one.stat().st_size for one in files) / 1e6:.1f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("like", type=Path)
    parser.add_argument("--runs", type=int, nargs="+", default=[1000])
    arguments = parser.parse_args()
    print("| runs | what | seconds | of processor | size |\n|---:|---|---:|---:|---:|")
    for count in arguments.runs:
        with tempfile.TemporaryDirectory(dir=arguments.like.resolve().parent) as place:  # links stay on one disk
            runs, one, folder = Path(place) / "runs", Path(place) / "report.html", Path(place) / "report"
            multiply(arguments.like, runs, count)
            for what, target in (
                ("`report`", None),
                ("`--html folder`", folder),
                ("the same again", folder),
                ("`--html file.html`", one),
            ):
                wall, used = measured([str(runs), *(["--html", str(target)] if target else [])])
                told = "" if target is None else size(target)
                print(f"| {count:,} | {what} | {wall:.1f} | {used:.1f} | {told} |", flush=True)
            print(f"| {count:,} | its `index.html` | | | {size(folder / 'index.html')} |")
            try:
                for name, page in (("folder", folder / "index.html"), ("file", one)):
                    for what, seconds in in_a_browser(page).items():
                        print(f"| {count:,} | {what} ({name}) | {seconds:.2f} | | |", flush=True)
            except ImportError:
                print("playwright is not installed: no figures of a browser", file=sys.stderr)


if __name__ == "__main__":
    main()
