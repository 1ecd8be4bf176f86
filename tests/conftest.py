"""What the tests share: nothing is downloaded, everything is tiny, one thread."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
# On a processor, MLX calls a C++ compiler for whatever it fuses: seconds each, and the same numbers.
os.environ["MLX_DISABLE_COMPILE"] = "1"

import copy  # noqa: E402 - after the variables above
import shutil  # noqa: E402
import sys  # noqa: E402
from functools import cache  # noqa: E402 - after the variables above

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)
# A busy machine is no reason to fail, and a test that passed yesterday passes today.
settings.register_profile("ponder", deadline=None, derandomize=True, database=None)
settings.load_profile("ponder")

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Weights far from zero, so that heads, caps and positions all show; windows shorter than the sequences.
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "qwen2": {"tie_word_embeddings": True},
    "llama": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"head_dim": 8, "sliding_window": 4},
    # caps its logits
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 5.0},
    "gemma2": {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 5.0},
    # scales its logits
    "granite": {"logits_scaling": 3.0},
    # its head has a bias
    "phi": {},
    # numbers its positions from a table, and calls its embeddings wte and wpe
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
}

CHROMIUM = "/usr/bin/chromium"
CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def tiny():
    """The built-in (model, tokenizer); shared, so leave them as they are."""
    from tiny import build_tiny

    model, tokenizer = build_tiny(0)
    return model.eval(), tokenizer


needs_a_compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which(os.environ.get("CC", "cc")) is None,
    reason="the fused kernels need a C compiler, and Linux",
)


@pytest.fixture
def kernels():
    """The fused kernels."""
    from fused_kernels import kernels_for

    found = kernels_for(torch.ones(1))
    if found is None:
        pytest.skip("the fused kernels need a C compiler, and Linux")
    return found


@pytest.fixture(scope="session")
def random_model():
    """Builds a random model by architecture, in float64 and evaluation mode; shared, so leave it as it is."""
    from transformers import AutoConfig, AutoModelForCausalLM

    @cache
    def build(name):
        config = AutoConfig.for_model(name, **SHAPE | ARCHITECTURES[name])
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config)
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("bias"):  # made zero, which would hide them
                    parameter.normal_(std=0.1)
        # Gemma 2 has no attention but its own, which takes the mask of float64 to infinity in float32: NaN.
        return model.eval() if name == "gemma2" else model.double().eval()

    return build


@pytest.fixture(scope="session")
def chat_tokenizer():
    """A byte-level BPE tokenizer with a ChatML template; shared, so change a copy."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    lines = ["Tom has 12 apples and buys 30 more.", "How many apples are there?", "the answer is 42"]
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"],
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|endoftext|>", eos_token="<|im_end|>", chat_template=CHATML
    )


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory, random_model, chat_tokenizer):
    """Saves a random model by architecture, in float32, with a tokenizer; shared, so leave it as it is."""
    from models import save_model

    @cache
    def save(name):
        folder = tmp_path_factory.mktemp(name)
        save_model(folder, copy.deepcopy(random_model(name)).float(), chat_tokenizer)
        return folder

    return save


@pytest.fixture(scope="session")
def reward_folder(tmp_path_factory, chat_tokenizer):
    """The folder of a random reward model with a chat template."""
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForSequenceClassification(Qwen2Config(**SHAPE, num_labels=1))
    folder = tmp_path_factory.mktemp("reward_model")
    model.save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def browser():
    """A real browser, headless."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
    if not os.path.exists(CHROMIUM):
        pytest.skip(f"the browser tests need {CHROMIUM} (apt-get install chromium)")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGS)
        yield browser
        browser.close()
