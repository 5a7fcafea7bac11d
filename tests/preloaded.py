"""Imports what `snap` imports, except FMS: processes that are forked afterwards start faster.

Imports take 1.5 of the 1.75 s of a check of the embedded checkpoint, and more of a recording.
"""

import importlib
import importlib.util

MODULES = (
    "hypothesis.strategies",
    "snapshot_tool.check.session",
    "snapshot_tool.cli.check",
    "snapshot_tool.cli.goldens",
    # Those that FMS imports.
    "torch._dynamo",
    "torch.distributed._functional_collectives",
    "torch.distributed.checkpoint",
)
RECORD_MODULES = (
    "snapshot_tool.cli.record",
    "snapshot_tool.record.workflow",
    "transformers.generation.utils",
    "transformers.models.idefics3.modeling_idefics3",
    "transformers.models.llama.modeling_llama",
)

for name in MODULES:
    importlib.import_module(name)
if importlib.util.find_spec("transformers"):
    for name in RECORD_MODULES:
        importlib.import_module(name)
