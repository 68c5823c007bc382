"""Prompt files, and the names VBench looks for."""

import json

import pytest
import torch

from stepcache.measure.prompts import check_seed, clip_name, read_prompts, read_seeds


def test_text(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# comment\n\none\n two \n")
    assert read_prompts(path) == ["one", "two"]
    path.write_text("one\none\n")
    with pytest.raises(ValueError, match="more than once"):
        read_prompts(path)
    path.write_text("\n# only this\n")
    with pytest.raises(ValueError, match="is empty"):
        read_prompts(path)


def test_vbench(tmp_path):
    path = tmp_path / "VBench_full_info.json"
    entries = [{"prompt_en": "a person", "dimension": ["human_action"]}, {"prompt_en": "a car"}]
    path.write_text(json.dumps([*entries, {"prompt_en": "a person", "dimension": ["color"]}]))
    assert read_prompts(path) == ["a person", "a car"]
    for text in ('[{"prompt": "x"}]', "[]", "[1]", '[{"prompt_en": 3}]'):
        path.write_text(text)
        with pytest.raises(ValueError, match="prompt_en"):
            read_prompts(path)
    path.write_text("[broken")
    with pytest.raises(ValueError, match="begins as JSON"):
        read_prompts(path)


def test_names():
    assert clip_name("a person, “quoted”", 3) == "a person, “quoted”-3.mp4"
    for prompt in ("a/b", "x" * 250, "é" * 130):
        with pytest.raises(ValueError, match="leave --vbench out"):
            clip_name(prompt, 0)


def test_seeds():
    assert read_seeds("0,1,-3,18446744073709551615") == [0, 1, -3, 2**64 - 1]
    for text, message in (
        ("", "whole numbers"),
        ("1;2", "whole numbers"),
        ("nan", "whole numbers"),
        ("1,1", "each seed once"),
        (str(2**64), "64 bits"),
        (str(-(2**63) - 1), "64 bits"),
    ):
        with pytest.raises(ValueError, match=message):
            read_seeds(text)


@pytest.mark.parametrize("seed", [0, 2**64 - 1, -(2**63)])
def test_the_seeds_that_are_taken_are_those_of_torch(seed):
    torch.Generator().manual_seed(seed)
    check_seed(seed)
    with pytest.raises((RuntimeError, ValueError, OverflowError)):
        torch.Generator().manual_seed(2**64)
