"""Methods, one paper one file. Each turns its settings into decisions for one run."""

from stepcache.methods import magcache_more_ratios as magcache_more
from stepcache.methods import magcache_ratios as magcache
from stepcache.methods.easycache import EasyCache
from stepcache.methods.lemica import LeMiCa
from stepcache.methods.magcache import MagCache, MagCacheCalibration, Ratios
from stepcache.methods.off import Off
from stepcache.methods.spectrum import Spectrum
from stepcache.methods.taylorseer import TaylorSeer
from stepcache.methods.teacache import TeaCache
from stepcache.methods.uniform import Uniform

magcache.RATIOS.update(magcache_more.RATIOS)


magcache.RECOMMENDED.update(magcache_more.RECOMMENDED)


magcache.SOURCES.update(magcache_more.SOURCES)


__all__ = [
    "EasyCache",
    "LeMiCa",
    "MagCache",
    "MagCacheCalibration",
    "Off",
    "Ratios",
    "Spectrum",
    "TaylorSeer",
    "TeaCache",
    "Uniform",
]
