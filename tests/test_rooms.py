"""Which file may import which: the walls of the house. A new file needs a row here."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What each file may import of ours; "rewards.*" is a package with all its modules. A module of a package
# that has no row of its own has its package's.
ROOMS = {
    # Nouns.
    "prompts": [],
    "tasks": ["prompts"],
    "data": ["prompts", "tasks"],
    "losses": [],
    "llama": ["fused_blocks", "fused_kernels"],
    "fused_kernels": [],
    "fused_blocks": ["fused_kernels"],
    "memory": [],
    "mixes": [],
    "zero": [],
    "sharding": ["llama", "memory", "runs.config", "zero"],
    "batches": ["memory", "runs.config", "runs.signals", "sharding"],
    "optimizers": ["sharding"],
    "tiny": ["prompts"],
    "tokenizer": ["prompts", "tiny"],
    "models": ["fused_kernels", "llama", "losses", "sharding", "tiny", "tokenizer", "zero"],
    "plan": [
        *["batches", "fused_kernels", "inference.decoders", "inference.engine", "llama", "losses", "memory"],
        *["models", "optimizers", "tiny", "tokenizer"],
    ],
    "preflight": ["data", "plan", "prompts", "rewards.*", "runs.watchdog", "sharding"],
    "figures": [],
    "answers": ["data", "exam", "runs.lines", "runs.records"],
    "exam": ["data", "figures", "inference", "prompts", "rewards.*", "runs.signals"],
    "choice": ["data", "exam", "prompts", "rewards.*"],
    "rewards": ["prompts", "rewards.*"],
    "rollouts": ["batches", "data", "inference", "memory", "prompts", "rewards.*"],
    "handover": ["data", "inference", "rewards.*", "rollouts", "runs.config", "runs.folder"],
    "credit": ["losses", "rewards.*", "rollouts"],
    "updates": ["batches", "losses", "optimizers", "rollouts"],
    "rehearsal": [
        *[
            "batches",
            "data",
            "inference",
            "models",
            "preflight",
            "prompts",
            "rewards.*",
            "rollouts",
            "runs.*",
        ],
        "sharding",
    ],
    "runs": ["fused_kernels", "models", "runs.*", "sharding"],
    "runs.config": [],
    "runs.console": [],
    "runs.training": [
        "models",
        "optimizers",
        "prompts",
        "runs.config",
        "runs.console",
        "tiny",
        "tokenizer",
    ],
    "runs.loop": ["memory", "runs.config", "runs.folder", "runs.signals"],
    # Engines: tokens in, tokens out.
    "inference": [],
    "inference.sampling": ["fused_kernels", "inference"],
    "inference.kv_cache": [],
    "inference.decoders": ["fused_blocks", "fused_kernels", "inference.kv_cache", "llama"],
    "inference.engine": ["inference", "inference.decoders", "inference.sampling", "memory"],
    "inference.http": [],
    "inference.server_engine": ["inference", "inference.http", "prompts"],
    "inference.formats": [],
    "inference.mlx_engine": ["inference", "inference.formats"],
    "inference.vllm_server": ["inference", "inference.http"],
    "inference.vllm_engine": ["inference", "inference.vllm_server"],
    # Whoever talks through an engine.
    "inference.markdown": [],
    "inference.reading": ["inference", "prompts"],
    "inference.search": ["inference", "inference.reading", "prompts", "rewards.verify"],
    "inference.answer_file": ["data", "inference", "inference.chat", "prompts", "runs.config"],
    "inference.chat": ["data", "inference.*", "models", "prompts", "runs.config", "tokenizer"],
    "inference.convert_mlx": [
        *["inference", "inference.formats", "inference.mlx_engine", "prompts", "runs.config", "tokenizer"],
    ],
    # Verbs: what a person runs. Nobody imports them.
    "train_sft": [
        *["batches", "data", "exam", "losses", "memory", "models", "optimizers", "plan", "preflight"],
        *["prompts", "rehearsal", "sharding", "inference.*", "runs.*", "tiny"],
    ],
    "train_grpo": [
        *["batches", "credit", "data", "exam", "memory", "mixes", "models", "optimizers", "plan"],
        *["preflight", "prompts", "rehearsal", "rollouts", "handover", "sharding", "tokenizer", "updates"],
        *["inference.*", "rewards.*", "runs.*"],
        "train_sft",  # for the cold start, in the same process
    ],
    "evaluate": [
        "answers",
        "choice",
        "data",
        "exam",
        "figures",
        "inference.*",
        "models",
        "prompts",
        "rewards.*",
        "runs.*",
        "tokenizer",
    ],
    "page": ["data", "inference.*", "page.*", "prompts", "rewards.*", "runs.*"],
    "app": ["data", "inference.*", "models", "page.*", "prompts", "rewards.*", "runs.*"],
    "export": ["inference.*", "models", "prompts", "runs.*", "tokenizer"],
}

# Who alone may import a package from outside, anywhere in the file.
GUARDED = {
    "torch": [
        *[
            "batches",
            "credit",
            "export",
            "fused_blocks",
            "fused_kernels",
            "llama",
            "losses",
            "memory",
            "models",
            "optimizers",
            "plan",
            "rehearsal",
            "rollouts",
            "runs.*",
            "sharding",
            "tiny",
            "train_grpo",
        ],
        *["train_sft", "updates", "zero"],
        *["inference.chat", "inference.decoders", "inference.engine", "inference.kv_cache"],
        *["inference.sampling", "inference.vllm_engine", "inference.vllm_server"],
    ],
    "transformers": ["inference.decoders", "inference.engine", "models", "plan", "tiny", "tokenizer"],
    "tokenizers": ["tiny"],
    "peft": ["models", "plan"],
    "deepspeed": ["zero"],
    "accelerate": [
        "batches",
        "credit",
        "evaluate",
        "exam",
        "handover",
        "memory",
        "models",
        "optimizers",
        "preflight",
        "rehearsal",
        "runs.*",
        "sharding",
        "train_grpo",
        "train_sft",
        "updates",
        "zero",
    ],
    "datasets": ["data"],
    "gradio": ["app", "page.*"],
    "mlx": ["inference.mlx_engine", "inference.convert_mlx", "inference.chat"],
    "mlx_lm": ["inference.mlx_engine", "inference.convert_mlx", "inference.chat"],
    # Through Accelerate's trackers.
    "wandb": [],
    "tensorboard": [],
    "trackio": [],
}

# What a Mac without torch must import: neither they nor what they import at the top may need any of these.
TORCH_FREE = [
    "prompts",
    "data",
    "inference",
    "inference.chat",
    "inference.formats",
    "inference.convert_mlx",
    "inference.http",
    "inference.mlx_engine",
    "inference.reading",
    "inference.search",
    "inference.server_engine",
    "rewards",
    "rewards.scorer",
    "app",
]
TORCH_BOUND = {
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "datasets",
    "peft",
    "sympy",
    "math_verify",
}


def our_files():
    """Module name and file of everything that ships."""
    folders = [ROOT, *(path.parent for path in ROOT.glob("*/__init__.py"))]
    for folder in folders:
        for path in sorted(folder.glob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(part for part in parts if part != "__init__"), path


FILES = dict(our_files())
TOP_LEVEL = {name.partition(".")[0] for name in FILES}


def imports(source, at_top=False):
    """The modules that a text imports, inside functions too unless `at_top`."""
    tree = ast.parse(source)
    for node in tree.body if at_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are written out in full"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from (names & FILES.keys()) or [node.module]
            if names - FILES.keys():
                yield node.module


def is_among(name, allowed):
    """Whether a row lets a module in."""
    return name in allowed or f"{name}.*" in allowed or f"{name.partition('.')[0]}.*" in allowed


@pytest.mark.parametrize("name", FILES)
def test_a_room_imports_only_through_its_doors(name):
    allowed = ROOMS.get(name, ROOMS.get(name.partition(".")[0]))
    assert allowed is not None, f"{name} is new: give it a row in ROOMS"
    ours = {module for module in imports(FILES[name].read_text()) if module.partition(".")[0] in TOP_LEVEL}
    through_the_wall = [module for module in sorted(ours) if not is_among(module, allowed)]
    assert not through_the_wall, f"{name} imports {through_the_wall}, and may import {allowed}"


@pytest.mark.parametrize("name", FILES)
def test_guarded_packages_stay_in_their_rooms(name):
    for module in imports(FILES[name].read_text()):
        package = module.partition(".")[0]
        if package in GUARDED:
            assert is_among(name, GUARDED[package]), f"{name} imports {package}, and must not"


def test_losses_see_torch_and_nothing_else():
    packages = {module.partition(".")[0] for module in imports(FILES["losses"].read_text())}
    assert packages - sys.stdlib_module_names == {"torch"}


@pytest.mark.parametrize("name", TORCH_FREE)
def test_what_a_mac_needs_is_free_of_torch(name):
    waiting, seen = [name], {}
    while waiting:
        module = waiting.pop()
        for imported in imports(FILES[module].read_text(), at_top=True):
            assert imported.partition(".")[0] not in TORCH_BOUND, f"{module} imports {imported}"
            # A module's package is imported before it.
            for ours in {imported, imported.partition(".")[0]} & FILES.keys() - seen.keys():
                seen[ours] = module
                waiting.append(ours)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.nn as nn", {"torch.nn"}),
        ("from rewards import shaping, judge", {"rewards.shaping", "rewards"}),
        ("from inference import engine", {"inference.engine"}),
        ("from rewards.verify import judge", {"rewards.verify"}),
        ("def f():\n    if x:\n        import gradio", {"gradio"}),
    ],
)
def test_the_reader_of_imports_sees_them_all(source, expected):
    assert set(imports(source)) == expected


def test_the_tables_name_what_exists():
    """A row for a file that is gone, or written wrong, guards nothing."""
    rows = [ROOMS, TORCH_FREE, *ROOMS.values(), *GUARDED.values()]
    named = {name.removesuffix(".*") for row in rows for name in row}
    assert named <= FILES.keys()
