"""Run by itself where the zoo cannot be imported: `python -I loading.py FOLDER` leaves FOLDER/found.pt."""

import sys
from pathlib import Path

import torch


class NoZoo:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "zoo":
            raise ImportError("the zoo is not here")


sys.meta_path.insert(0, NoZoo())

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline  # noqa: E402


def look(folder: Path) -> dict:
    model, told = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    tokens = torch.load(folder.parent / f"{folder.name}.pt")
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    found = {"told": {k: list(v) for k, v in told.items() if v}, "training": model.training, "tied": tied}
    how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        found["logits"] = model(tokens).logits
        found["greedy"] = model.generate(tokens, **how)
        found["without_cache"] = model.generate(tokens, use_cache=False, **how)
        cache = model(tokens[:, :5], use_cache=True).past_key_values
        found["second"] = model(tokens[:, 5:], past_key_values=cache, logits_to_keep=1).logits
        found["length"] = cache.get_seq_length()
        found["several"] = model.generate(tokens, num_return_sequences=2, num_beams=3, **how).shape
        # the first row behind three tokens of padding, the second before them
        padded = torch.zeros(2, tokens.shape[1] + 3, dtype=torch.int64)
        padded[0, 3:], padded[1, :-3] = tokens[0], tokens[1]
        mask = torch.ones_like(padded)
        mask[0, :3] = mask[1, -3:] = 0
        logits = model(padded, attention_mask=mask).logits
        found["padded"] = torch.stack([logits[0, 3:], logits[1, :-3]])
        found["refused"] = [refusal(model, padded, mask, True), refusal(model, padded, mask.roll(5, 1), False)]
        # rows of two lengths
        padded[1], mask[1] = padded[1].roll(3), 1
        mask[1, :5] = 0
        found["left"] = model.generate(padded, attention_mask=mask, **how)
        found["left_beams"] = model.generate(padded, attention_mask=mask, num_beams=3, **how)
        found["left_beams_alone"] = torch.stack(
            [model.generate(row[m == 1][None], num_beams=3, **how)[0, -8:] for row, m in zip(padded, mask, strict=True)]
        )
        found["reloaded"] = again(model, folder.parent.parent / "again" / folder.name)(tokens).logits
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    found["loss"] = loss.item()
    found["without_gradient"] = [n for n, p in model.named_parameters() if p.grad is None]
    return found


def again(model, folder):
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def refusal(model, tokens, mask, use_cache):
    try:
        model(tokens, attention_mask=mask, use_cache=use_cache)
    except ValueError as error:
        return str(error)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    found = {folder.name: look(folder) for folder in sorted(root.iterdir()) if folder.is_dir()}
    tokenizer = AutoTokenizer.from_pretrained(root / "llama", trust_remote_code=True)
    ids = tokenizer("Ünder\n two  words").input_ids
    found["ids"], found["text"], found["end"] = ids, tokenizer.decode(ids), tokenizer.eos_token_id
    write = pipeline("text-generation", str(root / "llama"), trust_remote_code=True)
    written = write(["Once upon", "A"], batch_size=2, max_new_tokens=4, do_sample=False, return_tensors=True)
    found["written"] = [row[0]["generated_token_ids"] for row in written]
    torch.save(found, root / "found.pt")
