"""TeaCache's published polynomials for Wan2.1 (highest power first), one for each of its two modes.

TeaCache, arXiv 2411.19108. Figures: ali-vilab/TeaCache, TeaCache4Wan2.1/teacache_generate.py, commit 7c10efc.
"""

SOURCE = "ali-vilab/TeaCache 7c10efc, TeaCache4Wan2.1/teacache_generate.py"


COEFFICIENTS: dict[str, dict[str, tuple[float, ...]]] = {
    "wan2.1-t2v-1.3B": {
        "ret_steps": (-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664),
        "no_ret_steps": (2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774),
    },
    "wan2.1-t2v-14B": {
        "ret_steps": (-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525),
        "no_ret_steps": (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
    },
    "wan2.1-i2v-14B-480p": {
        "ret_steps": (257151.496, -35422.9917, 1402.86849, -13.5890334, 0.132517977),
        "no_ret_steps": (-302.33167, 223.948934, -52.546397, 5.8734844, -0.201973289),
    },
    "wan2.1-i2v-14B-720p": {
        "ret_steps": (8107.0546, 2133.93892, -372.934672, 16.6203073, -0.0417769401),
        "no_ret_steps": (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
    },
}
