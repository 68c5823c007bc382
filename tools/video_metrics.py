"""PSNR, SSIM and LPIPS of two clips: `stepcache compare`, from a clone, without installing anything.

python tools/video_metrics.py full.mkv lemica.mkv
"""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("stepcache") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from stepcache.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
