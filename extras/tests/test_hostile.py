"""Checkpoints from strangers: what is in them is never executed, and gets a sentence if refused."""

import faulthandler
import functools
import json
import os
import pickle
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import wd1
from extras.tests.program import HERE, run
from rewards import InputError
from test_wd1 import TEMPLATE, write_checkpoint

# A file of a checkpoint, what a stranger wrote into it, and words of the sentence that refuses it;
# without words it loads as if that were not there. ITSELF is the directory.
WRITTEN = r"""
config.json {"alibi": true} -> alibi = True
config.json {"layer_norm_type": "low_precision"} -> layer_norm_type
config.json {"block_type": "sequential"} -> block_type
config.json {"activation_type": "swiglu"} -> activation_type
config.json {"attention_layer_norm": true} -> attention_layer_norm
config.json {"include_qkv_bias": true} -> include_qkv_bias
config.json {"quantization_config": {"quant_method": "gguf"}} -> quantization_config
config.json {"model_type": "bert"} -> model_type 'bert'
config.json {"model_type": ["llada"]} -> model_type
config.json {"model_type": "llama"} -> autoregressive
config.json {"n_heads": 5, "n_kv_heads": 5} -> cannot be loaded
config.json {"n_kv_heads": 3} -> heads
config.json {"n_kv_heads": 0} -> cannot be loaded
config.json {"d_model": "wide"} -> hidden_size
config.json {"attention_dropout": 5} -> attention_dropout
tokenizer_config.json {"chat_template": "\ud800"} -> cannot be used
config.json {"n_layers": 1000000000} -> 1000000000 layers
config.json {"d_model": 1000000000} -> cannot be loaded
config.json {"d_model": 65536} -> cannot be loaded
config.json {"embedding_size": 100000000} -> cannot be loaded
config.json {"mlp_hidden_size": true} -> intermediate_size
config.json {"mlp_hidden_size": 64} -> mlp.down_proj
config.json {"n_layers": 3} -> layers.2
config.json {"n_layers": 1} -> layers.1
config.json {"mask_token_id": 9999} -> mask_token_id
config.json {"mask_token_id": [1]} -> mask_token_id
config.json {"eos_token_id": true} -> eos_token_id
config.json {"mask_token_id": 260, "eos_token_id": [3, 260]} -> is an EOS
config.json {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}} ->
config.json {"attn_implementation": "evil/kernel", "_attn_implementation": "evil/kernel"} ->
config.json {"transformers_weights": "pytorch_model.bin"} ->
config.json {"save_pretrained": "x", "to_dict": 1, "attribute_map": {"a": "b"}} ->
config.json {"return_dict": false, "max_sequence_length": 4096} ->
generation_config.json {"custom_generate": "evil", "save_pretrained": 1} ->
tokenizer_config.json {"tokenizer_class": "evil.E", "auto_map": {"AutoTokenizer": ["evil.E"]}} ->
tokenizer_config.json {"fast_tokenizer_files": ["../outside/tokenizer.4.0.json"]} ->
tokenizer_config.json {"tokenizer_file": "/etc/passwd"} ->
tokenizer_config.json {"model_input_names": ["x"], "model_max_length": "x", "_tokenizer": "x"} ->
tokenizer_config.json {"split_special_tokens": true} ->
tokenizer_config.json {"chat_template": {"default": 1}} -> chat template
tokenizer_config.json {"chat_template": [{"name": "default", "template": "x"}]} -> chat template
tokenizer_config.json {"chat_template": "{% if"} -> cannot be used
tokenizer_config.json {"chat_template": "{{ raise_exception('boo') }}"} -> cannot be used
tokenizer_config.json {"chat_template": "{{ messages[5].x.y }}"} -> cannot be used
tokenizer_config.json {"chat_template": "{% include '/etc/passwd' %}"} -> cannot be used
tokenizer_config.json {"chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}"} -> cannot
tokenizer_config.json {"chat_template": "{{ cycler.__init__.__globals__.os.getcwd() }}"} -> cannot
tokenizer.json {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}} -> cannot
tokenizer.json {"model": 1} -> cannot be loaded
model.safetensors.index.json {"weight_map": {"x": "../outside/model.safetensors"}} ->
model.safetensors.index.json {"weight_map": {"x": "/etc/model.safetensors"}} ->
model.safetensors.index.json {"weight_map": {"x": "/dev/zero"}} ->
model.safetensors.index.json {"weight_map": {"x": "pytorch_model.bin"}} ->
model.safetensors.index.json {"weight_map": {"x": 1}} ->
model.safetensors.index.json {"weight_map": {"x": "model-00001.safetensors"}} ->
tiny_config.json {"mask_token_id": null} -> mask_token_id
tiny_config.json {"eos_token_id": null} -> eos_token_id
tiny_config.json {"model_type": ["llada"]} -> model_type
tiny_config.json {"d_model": -4} -> cannot be loaded
tiny_config.json {"pad_token_id": 9999} -> cannot be loaded
tiny_config.json {"n_kv_heads": 3} -> heads
adapter_config.json {"peft_type": "SHADOW", "shadow_model": "evil/repo"} -> SHADOW
adapter_config.json {"peft_type": "BOFT"} -> peft_type = 'BOFT'
adapter_config.json {"target_modules": "([a-z_.0-9]+)+X"} -> Target module
adapter_config.json {"revision": "main"} ->
adapter_config.json {"r": 1000000} -> r = 1000000
adapter_config.json {"r": 64} -> r = 64
adapter_config.json {"use_dora": true} -> use_dora = True
adapter_config.json {"layer_replication": [[0, 2], [0, 2]]} -> layer_replication
adapter_config.json {"init_lora_weights": "pissa_niter_999999999"} -> init_lora_weights
adapter_config.json {"megatron_core": "evil"} -> megatron_core
adapter_config.json {"lora_alpha": Infinity} -> lora_alpha
adapter_config.json {"scale_squared": true} -> scale_squared = True
adapter_config.json {"base_model_name_or_path": "ITSELF"} -> recursion
"""


def write(changes, file):
    """Changes settings in a JSON file."""
    settings = json.loads(file.read_text()) if file.exists() else {}
    changes = json.loads(changes.replace("ITSELF", str(file.parent)))
    file.write_text(json.dumps(settings | changes))


def written():
    """The lines of WRITTEN as cases: the name of a file, a function that harms it, and words."""
    for line in WRITTEN.strip().splitlines():
        what, words = line.split(" ->")
        name, changes = what.split(" ", 1)
        yield pytest.param(name, functools.partial(write, changes), words.strip(), id=line)


class Payload:
    """What a pickle runs when it is opened."""

    def __reduce__(self):
        return open, ("EXECUTED", "w")


def pickles_beside(file):
    for name in ("pytorch_model.bin", "adapter_model.bin", ".metadata"):
        file.with_name(name).write_bytes(pickle.dumps(Payload()))


def pickles_instead(file):
    pickles_beside(file)
    file.unlink()


def a_pipe(file):
    file.unlink()
    os.mkfifo(file)


def weight(change, name=None):
    """Changes the first weight of a file, or its name."""

    def harm(file):
        tensors = load_file(file)
        first = min(tensors)
        tensors[name or first] = change(tensors.pop(first))
        save_file(tensors, file)

    return harm


SHARD, OTHER = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
ADAPTERS = "adapter_model.safetensors"
DONE = [  # the same of what is done to files
    ("config.json", Path.unlink, "model_type"),
    ("config.json", lambda file: file.write_text("[1"), "cannot be loaded"),
    ("config.json", a_pipe, "model_type"),
    ("chat_template.jinja", lambda file: file.symlink_to("/etc/passwd"), ""),
    ("tokenizer.json", Path.unlink, "cannot be loaded"),
    ("*.safetensors", Path.unlink, "cannot be loaded"),
    ("model*", pickles_instead, "cannot be loaded"),
    ("config.json", pickles_beside, ""),
    (ADAPTERS, pickles_instead, "adapter_model"),
    (ADAPTERS, lambda file: file.symlink_to(file.rename(file.parents[1] / "else")), "of its own"),
    (ADAPTERS, weight(torch.clone, "base_model.q.lora_A.weight"), "another shape"),
    ("shard-00001-model-00001-of-00001.safetensors", Path.touch, ""),
    (SHARD, lambda file: os.truncate(file, 300), "cannot be loaded"),
    (SHARD, lambda file: shutil.copy(file, file.with_name(OTHER)), "twice"),
    (SHARD, weight(lambda tensor: tensor * torch.nan), "not finite"),
    (SHARD, weight(lambda tensor: tensor / 0), "not finite"),
    (SHARD, weight(torch.clone, "stray"), "cannot be loaded"),
    (SHARD, weight(torch.clone, "\x1b[31m\nx"), "cannot be loaded"),  # writes on a terminal
]

SEEN = []  # of what Python does: (event, its first argument)
READ = {".json", ".txt", ".jinja"}  # and safetensors, which are not opened by Python
NEVER = {"socket.connect", "subprocess.Popen", "os.system", "pickle.find_class"}


def look(event, arguments):
    if event in {"open", "import", "exec", *NEVER}:
        SEEN.append((event, getattr(arguments[0], "co_filename", arguments[0])))


sys.addaudithook(look)


def trespasses(directory):
    """What was seen that reading JSON, tables and weights of `directory` does not take."""
    homes = sys.prefix, sys.base_prefix, str(HERE), "/proc", "/sys", "/dev/null"
    copies = Path(tempfile.gettempdir())
    for event, what in SEEN:
        path = Path(str(what)).resolve()
        table = path.name in [*wd1.TABLES, "tokenizer_config.json"]
        known = (
            path.parent in (directory, directory.with_name("base")) and path.suffix in READ
            or path.parent == copies
            or table and path.parent.parent == copies
            or str(path).startswith(homes)
        )  # fmt: skip
        strange = event in NEVER or event == "open" and not known
        if strange or "evil" in str(what) or path.stem == "generation_config":
            yield event, what


def logits(source):
    """What a model predicts after a prompt, as its tokenizer and chat template lay it out."""
    model, tokenizer = wd1.load_model(source)
    wd1.check_model(model, tokenizer, ["in the land", "of the mask"], wd1.Config(model=str(source)))
    return wd1.predict_logits(model, wd1.encode(tokenizer, ["the <|mask|> land"]).input_ids)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A checkpoint that nobody has touched, and its logits."""
    directory, *_ = write_checkpoint(tmp_path_factory.mktemp("pristine") / "model", "llada")
    (directory / "evil.py").write_text("open('EXECUTED', 'w')")
    return directory, logits(directory)


@pytest.fixture
def place(tmp_path, monkeypatch, pristine):
    """A copy of it to be harmed. A test that waits for ever, for a pipe say, is ended."""
    monkeypatch.chdir(tmp_path)
    signal.signal(signal.SIGALRM, lambda *_: sys.exit("waits"))
    signal.alarm(20)
    yield Path(shutil.copytree(pristine[0], tmp_path / "model"))
    signal.alarm(0)


@pytest.mark.parametrize("name, harm, words", [*written(), *DONE])
def test_nothing_of_a_hostile_checkpoint_is_executed(place, pristine, name, harm, words):
    source = place
    if name == "tiny_config.json":
        source = Path(shutil.copy(HERE / name, place))
    if name.startswith("adapter"):  # the checkpoint is then what they adapt
        base = place.rename(place.with_name("base"))
        wd1.add_adapters(wd1.load_model(base)[0], 2).save_pretrained(place)
    for file in list(place.glob(name)) or [place / name]:
        harm(file)
    SEEN.clear()
    if words:
        with pytest.raises(InputError, match=words) as raised:
            logits(source)
        assert str(raised.value).isprintable() and len(str(raised.value)) < 600
    else:
        assert torch.equal(logits(source), pristine[1])
    assert not list(trespasses(place)) and not list(place.parent.rglob("EXECUTED"))


LOOP = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
EXHAUSTING = {  # of time, then of memory: a file, and what a stranger writes into it
    LOOP: "tokenizer_config.json",
    "{{ 'x' * 10 ** 10 }}": "tokenizer_config.json",
    "{{ 1 }}" * 10**6: "tokenizer_config.json",
    "normalizer": "tokenizer.json",
    "decoder": "tokenizer.json",
}


@pytest.mark.parametrize("what, name", EXHAUSTING.items(), ids=lambda what: what[:20])
def test_a_template_or_a_table_that_exhausts_the_machine_is_refused(
    place, monkeypatch, what, name
):
    """In two seconds and a gigabyte here. Each would take minutes, or ten gigabytes."""
    monkeypatch.setattr(wd1.try_out, "__defaults__", (2, 2**30))
    faulthandler.disable()  # pytest's would tell of the process that is ended
    multiply = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    steps = {"decoders" if what == "decoder" else "normalizers": [multiply] * 4}
    change = {what: {"type": "Sequence", **steps}}
    change = {"chat_template": what} if name == "tokenizer_config.json" else change
    (place / "chat_template.jinja").unlink(missing_ok=True)
    write(json.dumps(change), place / name)
    with pytest.raises(InputError, match="takes too much time or memory"):
        wd1.load_model(place)


def test_special_tokens_in_a_file_of_their_own_and_links_into_a_hubs_cache_load(place, pristine):
    ids = '{"mask_token": "<|mask|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}'
    write(ids, place / "special_tokens_map.json")
    (place / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    write('{"mask_token_id": null, "eos_token_id": null}', place / "config.json")
    blobs = place.rename(place.with_name("blobs"))
    place.mkdir()
    for file in list(blobs.iterdir()):
        (place / file.name).symlink_to(file.rename(f"{file}-blob"))
    assert torch.equal(logits(place), pristine[1])


def test_dreams_tokens_may_be_in_added_tokens(place):
    dream, *_ = write_checkpoint(place.with_name("dream"), "Dream")
    want = logits(dream)
    added = '{"<|endoftext|>": 260, "<|mask|>": 261, "<|start|>": 262, "<|end|>": 263}'
    write(added, dream / "added_tokens.json")
    write('{"added_tokens_decoder": {}}', dream / "tokenizer_config.json")
    write('{"mask_token_id": null}', dream / "config.json")
    assert torch.equal(logits(dream), want)


def test_a_tokenizer_with_tokens_that_the_model_does_not_know_is_refused(tmp_path, capsys):
    file = Path(shutil.copy(HERE / "tiny_config.json", tmp_path))
    write('{"vocab_size": 20, "embedding_size": 20}', file)
    code, directory = run(tmp_path, model=file)
    assert code == 2 and "tokens beyond" in capsys.readouterr().err
    assert not directory.exists()
