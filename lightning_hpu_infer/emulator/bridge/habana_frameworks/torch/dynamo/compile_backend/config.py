"""The names that ``torch.compile(..., options={...})`` knows, and the bridge's defaults; none changes the emulation."""

import sys

from torch.utils._config_module import install_config_module

use_compiled_recipes = True
decomposition_mode = "habana"
verbose = False
keep_input_mutations = True
use_eager_fallback = True
use_graph_freezing = False
discard_frozen_params = False
remove_unnecessary_clones = True
use_inplace_allreduce = True
use_inplace_index_copy = True
inference = True
enable_sfg = False
use_cpp_partitioner = True
enable_allreduce_graph_split = True
enable_waittensor_graph_split = True
force_static_compile = False
reinplace_add = True
reassign_full_copy = True
reassign_copy_ = True
use_boxed_input = True
use_generic_reinplacer = True
enable_synapse_input_reuse = True

# Adds `patch`, whose error for unknown names is the one that users see.
install_config_module(sys.modules[__name__])
