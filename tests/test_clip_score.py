"""The CLIP score, of a tiny CLIP with random weights: against its formula, and where there are none."""

import json

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from stepcache.measure.clip_score import ClipScore, find_clip_score


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("clip")
    letters = [chr(i) for i in range(97, 123)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (place / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (place / "merges.txt").write_text("#version: 0.2\n")
    text = {"vocab_size": len(words), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(place)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokenizer = CLIPTokenizer(str(place / "vocab.json"), str(place / "merges.txt"))
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(place)
    return place


def test_it_is_the_formula(folder):
    score, source = find_clip_score(folder)
    assert source == str(folder)
    frames = np.random.default_rng(0).integers(0, 256, (3, 40, 48, 3), np.uint8)
    given = score.processor(text=["a red cat"], images=list(frames), return_tensors="pt", padding=True)
    with torch.no_grad():
        found = score.model(**given)
    cosines = torch.cosine_similarity(found.image_embeds, found.text_embeds)
    assert score(frames, "a red cat") == pytest.approx(100 * float(cosines.clamp(min=0).mean()), rel=1e-5)
    assert score(np.repeat(frames[:1], 20, 0), "a red cat") == pytest.approx(score(frames[:1], "a red cat"), rel=1e-5)


def test_no_weights_is_none_and_why(tmp_path):
    found, why = find_clip_score()
    assert found is None
    assert "clip-vit-base-patch32 is not in transformers' cache" in why
    assert find_clip_score(tmp_path)[0] is None


def test_the_class_is_what_is_found(folder):
    assert isinstance(find_clip_score(folder)[0], ClipScore)
