"""Methods, one paper one file. Each turns its settings into decisions for one run."""

from stepcache.policies.checked import Checked
from stepcache.policies.easycache import EasyCache
from stepcache.policies.fixed import Fixed, Off, as_policy
from stepcache.policies.lemica import LeMiCa
from stepcache.policies.magcache import MagCache, MagCacheCalibration, Ratios
from stepcache.policies.taylorseer import TaylorSeer
from stepcache.policies.teacache import TeaCache
from stepcache.policies.uniform import Uniform
from stepcache.published import magcache, magcache_more

magcache.RATIOS.update(magcache_more.RATIOS)
magcache.RECOMMENDED.update(magcache_more.RECOMMENDED)
magcache.SOURCES.update(magcache_more.SOURCES)
magcache.WHOLE_FIRST_EXPERT.update(magcache_more.WHOLE_FIRST_EXPERT)

__all__ = [
    "Checked",
    "EasyCache",
    "Fixed",
    "LeMiCa",
    "MagCache",
    "MagCacheCalibration",
    "Off",
    "Ratios",
    "TaylorSeer",
    "TeaCache",
    "Uniform",
    "as_policy",
]
