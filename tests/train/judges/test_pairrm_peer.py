"""PairRM against the source of llm-blender 0.0.2, with the same random weights.

llm-blender cannot be imported with transformers 5, so its class and functions are read from its files. Where it is not
installed (`pip install --no-deps llm-blender==0.0.2`), only test_pairrm.py compares, with the published formulae.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from tiny_pairrm import make_pairrm, make_tokenizer

from windkern.train.data.prompts import ChatPrompt
from windkern.train.judges.pairrm import PairRM, pair_texts

_found = importlib.util.find_spec("llm_blender")
pytestmark = pytest.mark.skipif(_found is None, reason="llm-blender is not installed")
PROMPTS = ["the bus was", "rain and", "a day so very"]
FIRSTS = ["very good", "bad", "a day and so good bad rain"]
SECONDS = ["bad", "good good good not", "rain"]


def their(file: str, *names: str) -> list:
    """Read classes and functions from one of its files."""
    source = Path(_found.submodule_search_locations[0], file).read_text("utf-8")
    tree = ast.parse(source)
    kept = (ast.Import, ast.ImportFrom) if file.endswith("pairrm.py") else ()
    tree.body = [node for node in tree.body if isinstance(node, kept) or getattr(node, "name", None) in names]
    known: dict = {"List": list}
    exec(compile(tree, file, "exec"), known)
    return [known[name] for name in names]


def test_logits_are_those_of_its_own_class_on_the_same_weights():
    (kind,) = their("pair_ranker/pairrm.py", "DebertaV2PairRM")
    (tokenize,) = their("blender/blender_utils.py", "tokenize_pair")
    ours, tokenizer = make_pairrm(), make_tokenizer()
    config, known = ours.config, tokenizer.get_vocab()
    config.source_prefix_id, config.cand1_prefix_id, config.cand2_prefix_id = (
        known[name] for name in ("<|source|>", "<|candidate1|>", "<|candidate2|>")
    )
    config.sep_token_id = config.cand_prefix_id = None  # stored by its class but never read
    theirs = kind(config).eval()
    theirs.load_state_dict(ours.state_dict())
    rows = tokenize(tokenizer, PROMPTS, FIRSTS, SECONDS)
    with torch.no_grad():
        want = theirs(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], return_dict=True).logits
    read = PairRM(ours, tokenizer, batch_size=2)
    encoded = [read.encode(*entry) for entry in zip(PROMPTS, FIRSTS, SECONDS, strict=True)]
    for row, ids, seen in zip(encoded, rows["input_ids"], rows["attention_mask"], strict=True):
        assert row["input_ids"] == ids[seen.bool()].tolist()
    assert want.std() > 0.05
    torch.testing.assert_close(read.classifier(encoded)[:, 0], want, rtol=1e-4, atol=1e-5)
    assert read(PROMPTS, FIRSTS, SECONDS) == pytest.approx(want.sigmoid().tolist(), abs=1e-5)


def test_texts_are_cut_where_it_cuts_them():
    (tokenize,) = their("blender/blender_utils.py", "tokenize_pair")
    tokenizer = make_tokenizer()
    long = ("day " * 1500, "good " * 900, "rain " * 20)
    rows = tokenize(tokenizer, *([text] for text in long))
    assert PairRM(make_pairrm(), tokenizer).encode(*long)["input_ids"] == (
        rows["input_ids"][0][rows["attention_mask"][0].bool()].tolist()
    )


def test_conversations_are_written_as_it_writes_them():
    (write,) = their("blender/blender_utils.py", "get_pair_from_conv")
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "Why?"), ("assistant", "So."), ("user", "And?")]
    chat = ChatPrompt([{"role": role, "content": text} for role, text in turns])
    talks = [
        [{"role": role.upper(), "content": text} for role, text in [*turns, ("assistant", last)]]
        for last in ("good", "bad")
    ]
    source, firsts, seconds = write(*([talk] for talk in talks))
    ours, before = pair_texts(chat)
    assert (ours, before + "good", before + "bad") == (source[0], firsts[0], seconds[0])
