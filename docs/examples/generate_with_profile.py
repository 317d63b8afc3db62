"""Generate text with a profile: prefill attends sparsely, decoding densely.

    python docs/examples/generate_with_profile.py   # with the shipped profile
    python docs/examples/generate_with_profile.py --profile demo-profile.yaml --point fidelity

Three ways to serve one long prompt, under the same handle: `model.generate` with streaming; a loop of one's own, whose
prefill comes in chunks (as servers do, to bound memory); and dense attention, to see the difference. `handle.stats()` says
what ran sparsely, what did not, and why.
"""

import argparse
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from quick_profile import profile_for
from transformers import DynamicCache, TextStreamer

import xcalib
from xcalib.models.loading import LoadedModel

QUESTION = "\n\nQuestion: Which number did the note in the middle of this text give?\nAnswer: The number is"
NOTE = " (A note: the number is 48213.) "


def long_prompt(loaded: LoadedModel, tokens: int) -> torch.Tensor:
    """Shipped prose with a note in its middle and a question at its end: ``(1, tokens or so)``."""
    text = (files("xcalib.data.corpus") / "prose" / "emma-01.txt").read_text("utf-8")
    start, note, end = (
        loaded.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, NOTE, QUESTION)
    )
    half = (tokens - len(note) - len(end)) // 2
    return torch.tensor([[*start[:half], *note, *start[half : 2 * half], *end]], device=loaded.model.device)


def stream(loaded: LoadedModel, prompt: torch.Tensor, new_tokens: int) -> list[int]:
    """transformers' own loop; the text is printed as it comes."""
    streamer = TextStreamer(loaded.tokenizer, skip_prompt=True)
    mask = torch.ones_like(prompt)
    output = loaded.model.generate(
        prompt, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, streamer=streamer,
        pad_token_id=loaded.tokenizer.eos_token_id,
    )  # fmt: skip
    return output[0, prompt.shape[1] :].tolist()


@torch.inference_mode()
def in_chunks(loaded: LoadedModel, prompt: torch.Tensor, new_tokens: int, chunk: int) -> tuple[list[int], torch.Tensor]:
    """A loop of one's own: new tokens, and the logits ``(vocabulary,)`` after the prompt.

    A chunk's queries meet the keys of all chunks before it, from the cache. Chunks of whole blocks give the same block rows as
    one long prefill.
    """
    cache = DynamicCache(config=loaded.model.config)
    for part in prompt.split(chunk, dim=1):
        logits = loaded.model(part, past_key_values=cache, logits_to_keep=1).logits[0, -1]
    after_prompt, found = logits, []
    for _ in range(new_tokens):
        found.append(int(logits.argmax()))
        if found[-1] == loaded.tokenizer.eos_token_id:
            break
        step = torch.tensor([[found[-1]]], device=prompt.device)
        logits = loaded.model(step, past_key_values=cache).logits[0, -1]
    return found, after_prompt


def report(stats: dict[str, Any]) -> None:
    """What ``handle.stats()`` holds; a call is one layer's attention."""
    print(
        f"  {stats['sparse_calls']} sparse calls, {stats['density']:.1%} of the blocks that causality allows were computed"
    )
    for reason, count in stats["dense_reasons"].items():
        print(f"  {count} dense calls: {reason}")
    if stats["extrapolated_calls"]:
        print(f"  {stats['extrapolated_calls']} calls had more keys than the profile was measured with")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a Hugging Face id, a folder, a .gguf file, or demo")
    parser.add_argument(
        "--profile", type=Path, help="default: the shipped one for demo; for others a small one is made"
    )
    parser.add_argument("--point", help="an operating point; default the profile's")
    parser.add_argument("--tokens", type=int, default=1024, help="of the prompt")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a prefill step; whole blocks")
    parser.add_argument(
        "--work", type=Path, default=Path("xcalib-out/examples"), help="where a small profile's curves are kept"
    )
    options = parser.parse_args()

    loaded = xcalib.load_model(options.model)
    profile = profile_for(options.profile, loaded, options.work)
    prompt = long_prompt(loaded, options.tokens)
    print(f"a prompt of {prompt.shape[1]} tokens; point {profile.point(options.point).name}")

    print("\ndense:")
    _, dense = in_chunks(loaded, prompt, 1, prompt.shape[1])
    stream(loaded, prompt, options.new_tokens)

    with xcalib.apply_profile(loaded.model, profile, options.point) as handle:
        print("\nwith the profile, model.generate:")
        streamed = stream(loaded, prompt, options.new_tokens)
        report(handle.stats())

        handle.reset_stats()
        print(f"\nwith the profile, a loop of one's own, prefill in chunks of {options.chunk} tokens:")
        looped, sparse = in_chunks(loaded, prompt, options.new_tokens, options.chunk)
        print(loaded.tokenizer.decode(looped))
        report(handle.stats())

    kl = torch.nn.functional.kl_div(sparse.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="sum")
    print(f"\nboth ways gave {'the same' if streamed == looped else 'different'} tokens")
    print(f"the next token's distribution after the prompt: KL {float(kl):.4f} nats from dense")
    _, again = in_chunks(loaded, prompt, 1, prompt.shape[1])
    print(f"the handle is removed; the model is its own again, bit for bit: {torch.equal(again, dense)}")


if __name__ == "__main__":
    main()
