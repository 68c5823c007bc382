"""The project's own benchmark on the embedded model: `stepcache bench`, `stepcache report`, and docs/benchmarks.md.

    python bench/embedded.py                 a quarter of an hour on two cores; --resume goes on

Prompts are `assets/tiny-wan/evaluation_prompts.txt`; the plans (`assets/tiny-wan/plans`) were made from others.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from stepcache.bench.labels import label, labels
from stepcache.bench.results import REFERENCE, Folder, Row, table
from stepcache.commands.main import main as stepcache
from stepcache.files import write_atomically
from stepcache.measure.prompts import read_prompts

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "assets" / "tiny-wan"
WAN = "table=wan2.1-t2v-1.3B"
RATIOS = f"ratios={MODEL / 'magcache_ratios.json'}"
POLICIES = [
    *(f"plan:{MODEL / 'plans' / f'hindsight-{b}.json'}" for b in (25, 20, 17, 14, 10)),
    *(f"hindsight:{b}" for b in (25, 17)),
    *(f"uniform:{b}" for b in (25, 17)),
    *(f"lemica:{b},{WAN}" for b in (25, 17)),
    *(f"easycache:@{b}" for b in (25, 17)),
    *(f"magcache:@{b},K=6,{RATIOS}" for b in (25, 17)),
    *(f"taylorseer:{n}" for n in (2, 3)),
    *(f"steps:{b}" for b in (25, 17)),
    *(f"fbcache:@{b}" for b in (25, 17)),
    "seacache:@25",
    *(f"diffusers-taylorseer:{n}" for n in (2, 3)),
    "cachedit:@25,W=4",
    "cachedit:@25,W=4,taylor=1",
]


def markdown(rows: list[Row], schedules: dict[str, str]) -> str:
    """The table as Markdown; `schedules` says where those of the methods come from."""
    names = {method: found.row for method, found in labels((r.method for r in rows), schedules).items()}
    lines = ["| method | computed | speed-up | ideal | PSNR, dB | worst | SSIM | worst |", "|---" * 8 + "|"]
    for r in rows:
        if r.failed == r.items:
            lines.append(f"| {names[r.method]} | failed | | | | | | |")
            continue
        own = r.method == REFERENCE
        psnr = ["-", "-"] if own else [_decibel(r.psnr), _decibel(r.psnr_worst)]
        ssim = ["-", "-"] if own else [f"{r.ssim:.4f}", f"{r.ssim_worst:.4f}"]
        cells = [f"{r.computed:.1f}", f"{r.speedup:.2f}x", f"{r.ideal:.2f}x", *psnr, *ssim]
        lines.append(f"| {names[r.method]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _decibel(value: float | None) -> str:
    return "same" if value is None else f"{value:.1f}"


def document(folder: Folder) -> str:
    """docs/benchmarks.md."""
    about = folder.read()
    searched = ", ".join(f"`{label(name).row}` {value:.4g}" for name, value in about["searched"].items())
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    request = about["request"]
    return f"""# Benchmarks on the embedded model

Made by `python bench/embedded.py --prompts {len(about["prompts"])}` on {about["date"]}; do not edit.
{about["machine"]}, {about["dtype"]}; {versions}.

{len(about["prompts"])} prompts, seed 0, {request["steps"]} steps of {about["sampler"]}, guidance
{request["guidance"]:g}, {request["num_frames"]} frames of {request["width"]} x {request["height"]}.
Plans come from eight other prompts
([planning.md](planning.md)); `lemica` borrows the list published for Wan2.1-T2V-1.3B. What the columns mean and how
peers' steps are counted: [bench.md](bench.md). These figures are about a small model and say nothing of Wan2.1.

![PSNR over computed steps](figures/benchmark-psnr.svg)

{markdown(table(folder), about.get("schedules", {}))}

Thresholds that were searched: {searched}.
"""


def main() -> int:
    """Run, report, write the document and its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(ROOT / "outputs" / "bench"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--prompts", type=int, default=32, help="take the first so many (32)")
    args = parser.parse_args()
    chosen = Path(args.out).with_suffix(".prompts.txt")
    chosen.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(chosen, "\n".join(read_prompts(MODEL / "evaluation_prompts.txt")[: args.prompts]) + "\n")
    arguments = ["--model", str(MODEL), "--prompts", str(chosen), "--guidance", "5"]
    if args.resume:
        arguments.append("--resume")
    code = stepcache(["bench", *arguments, "--policies", " ".join(POLICIES), "--out", args.out])
    if code not in (0, 1) or stepcache(["report", args.out]):
        return 2
    figures = ROOT / "docs" / "figures"
    figures.mkdir(exist_ok=True)
    for name in ("psnr", "speedup"):
        shutil.copyfile(Path(args.out) / "figures" / f"{name}.svg", figures / f"benchmark-{name}.svg")
    write_atomically(ROOT / "docs" / "benchmarks.md", document(Folder(Path(args.out))))
    print("wrote docs/benchmarks.md and docs/figures/")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
