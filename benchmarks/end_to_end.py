"""Whole models: steps of training and decoded tokens, of `SmallLM` and of transformers' models, with and
without us.

Useful work is 6 FLOPs a parameter and token for a step of training, 2 for a decoded token, attention aside.
Bytes: the parameters once a token that is decoded; in training the weights, their gradients and AdamW's
moments, read and written. A case is checked like those of the operations, by its logits and the gradient of
its input embedding; in float64 transformers still computes some of its parts in float32.
"""

import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slmkernels.models import SmallLM, SmallLMConfig

from . import end_to_end_peers as peers
from .cases import OURS, Bar, Candidate, Case, Inputs, Run, chosen_backend
from .end_to_end_peers import Within

TRAINING, GENERATION = "training", "generation"  # in the place of an operation's name
CHECKED_TOKENS = 512  # of the first ones of a step: more would make the float64 check slow
LEARNING_RATE = 1e-4
SMALL_LM_TOKENS = {"1m": 2048, "5m": 2048, "15m": 1024}  # of a step
PROMPT, DECODED = 256, 32  # tokens of a SmallLM: before the clock starts, and by it
STYLE_TOKENS = {"qwen3_next": 1024, "mistral": 4096, "olmoe": 1024}  # of a step
STYLE_PROMPT, STYLE_DECODED = 512, 32
SMALL = 48  # tokens in place of all these but the decoded ones
SMALL_DECODED = 4
PARAMETERS = {"qwen3_next": 3_902_040, "mistral": 2_623_744, "olmoe": 4_477_184}  # that a token meets
# What ours must reach, and aims at.
BARS = {
    "end_to_end/small_lm_15m/generation/fp32": (Bar("PyTorch, *", 1.5, 2),),
    "end_to_end/qwen3_next/training/fp32": (Bar("transformers", 2, 3),),
    "end_to_end/mistral/training/fp32": (Bar("transformers", 2, 3),),
}


def _tokens(vocabulary: int, length: int, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    return {"tokens": torch.randint(vocabulary, (1, length), generator=generator).to(device)}


def _first(length: int, inputs: Inputs) -> Inputs:
    """The inputs cut to their first tokens, if there are more."""
    tokens = inputs["tokens"]
    return {"tokens": tokens[:, :length]} if tokens.shape[1] > length else inputs


# ---- a step of training ------------------------------------------------------------------------------------


def _training_step(
    build: Callable[[], nn.Module],
    logits_of: Callable[[nn.Module, Tensor], Tensor],
    within: Within,
    dtype: torch.dtype,
    inputs: Inputs,
) -> Run:
    """Forward, cross-entropy of every next token, backward and a step of AdamW."""
    tokens = inputs["tokens"]
    model = build().to(tokens.device, dtype).train()
    embedding = next(m for m in model.modules() if isinstance(m, nn.Embedding)).weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def call() -> tuple[Tensor, ...]:
        with within(model), torch.enable_grad():
            logits = logits_of(model, tokens)
            loss = F.cross_entropy(logits[0, :-1].float(), tokens[0, 1:])
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        return logits.detach(), embedding.grad

    return Run(call, parameters=tuple(model.parameters()))


# ---- decoding ----------------------------------------------------------------------------------------------


def _small_lm_decoding(
    build: Callable[[], SmallLM], prompt: int, within: Within, dtype: torch.dtype, inputs: Inputs
) -> Run:
    """Token by token behind a prompt, the likeliest taken of each; the tokens are given, so that a choice
    between equals does not part two candidates. The text goes on from call to call."""
    tokens = inputs["tokens"]
    model = build().to(tokens.device, dtype).eval()
    caches = model.new_caches(1)
    with torch.no_grad(), within(model):
        model.hidden_states(tokens[:, :prompt], caches=caches)

    def call() -> tuple[Tensor, ...]:
        scores = []
        with torch.no_grad(), within(model):
            for token in tokens[:, prompt:].split(1, dim=1):
                x = model.hidden_states(token, caches=caches)[:, -1]
                scores.append(model.logits(x))
                scores[-1].argmax(-1)
        return (torch.stack(scores, dim=1),)  # [1, n, V]

    return Run(call, parameters=tuple(model.parameters()))


def _generate(
    build: Callable[[], nn.Module], n: int, within: Within, dtype: torch.dtype, inputs: Inputs
) -> Run:
    """transformers' `generate`: the prompt and `n` tokens, greedily."""
    tokens = inputs["tokens"]
    model = build().to(tokens.device, dtype).eval()
    options = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True}

    def call() -> tuple[Tensor, ...]:
        with torch.no_grad(), within(model):
            found = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        return (torch.stack(found.logits, dim=1),)  # [1, n, V]

    return Run(call, parameters=tuple(model.parameters()))


# ---- the cases ---------------------------------------------------------------------------------------------

MakeRun = Callable[[Within, torch.dtype, Inputs], Run]


def _case(name: str, make: MakeRun, peers_of: dict[str, Within], exact: Within, **fields) -> Case:
    """`make` is given what the model runs on; `exact` is that of float64."""
    ours, plain = fields.pop("ours"), next(iter(peers_of.values()))
    full = f"end_to_end/{name}/fp32"
    return Case(
        name=full,
        dtype=torch.float32,
        ours=Candidate(OURS, partial(make, ours, torch.float32)),
        peers=tuple(Candidate(peer, partial(make, on, torch.float32)) for peer, on in peers_of.items()),
        reference=lambda inputs: make(exact, torch.float64, inputs).call(),
        plain=lambda inputs: make(plain, torch.float32, inputs).call(),
        **fields,
    )


@lru_cache
def _parameters(config: SmallLMConfig) -> int:
    with torch.device("meta"):
        return SmallLM(config).num_parameters()


def _build_small_lm(config: SmallLMConfig) -> SmallLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SmallLM(config)


def _small_lm_backend(config: SmallLMConfig, inputs: Inputs) -> str:
    q = torch.zeros(1, 1, config.num_heads, config.dim // config.num_heads, device=inputs["tokens"].device)
    return chosen_backend("sliding_window_attention", q, q, q, window=config.window)


def _work(mode: str, parameters: int, tokens: int) -> dict[str, int]:
    """FLOPs and bytes in float32; see the head of this file."""
    if mode == TRAINING:
        return {"flops": 6 * parameters * tokens, "bytes": 4 * 9 * parameters}
    return {"flops": 2 * parameters * tokens, "bytes": 4 * parameters * tokens}


def small_lm_case(preset: str, mode: str, small: bool) -> Case:
    """A preset of `SmallLM`, layers SSSF, against the same model on PyTorch's attention."""
    changes = {"dim": 64, "num_layers": 4, "num_heads": 2, "num_kv_heads": 1, "hidden": 64, "window": 16}
    config = SmallLMConfig.preset(preset, **(changes if small else {}))
    build, parameters = partial(_build_small_lm, config), _parameters(config)
    before, n = (SMALL, SMALL_DECODED) if small else (PROMPT, DECODED)
    if mode == TRAINING:
        n = length = SMALL if small else SMALL_LM_TOKENS[preset]
        make = partial(_training_step, build, lambda model, tokens: model(tokens))
        on, sizes = peers.SMALL_LM_PEERS, f"T={n}, AdamW"
    else:
        length, make = before + n, partial(_small_lm_decoding, build, before)
        on, sizes = {"PyTorch, SDPA": peers.SMALL_LM_PEERS["PyTorch, SDPA"]}, f"{n} tokens behind {before}"
    return _case(
        f"small_lm_{preset}/{mode}",
        make,
        on,
        exact=on["PyTorch, SDPA"],
        ours=lambda model: nullcontext(),
        operation=mode,
        sizes=f"SmallLM {preset}, {parameters:,} parameters, {config.layers}, W={config.window}, {sizes}",
        outputs=("logits", "dembedding") if mode == TRAINING else ("logits",),
        inputs=partial(_tokens, config.vocab_size, length),
        checked=partial(_first, CHECKED_TOKENS),
        backend=partial(_small_lm_backend, config),
        tokens=n,
        **_work(mode, parameters, n),
    )


def _replaced(build: Callable[[], nn.Module], inputs: Inputs) -> str:
    """What `accelerated` says that it replaced, in a word or two each."""
    with peers.accelerated(build().to(inputs["tokens"].device)) as report:
        return ", ".join(re.split("[,:]| and ", what)[0] for what in report.replaced)


def style_case(style: str, mode: str, small: bool) -> Case:
    """A model of transformers on its own default paths, against the same with `accelerated`."""
    build, options = partial(peers.build_style, style, small), peers.style_options(style, small)
    before, n = (SMALL, SMALL_DECODED) if small else (STYLE_PROMPT, STYLE_DECODED)
    if mode == TRAINING:
        n = length = SMALL if small else STYLE_TOKENS[style]
        make = partial(_training_step, build, lambda model, tokens: model(tokens, use_cache=False).logits)
        sizes = f"T={n}, AdamW"
    else:
        length, make, sizes = before, partial(_generate, build, n), f"{before} tokens, then {n} more"
    shape = f"hidden {options['hidden_size']}, {options['num_hidden_layers']} layers"
    return _case(
        f"{style}/{mode}",
        make,
        {"transformers": lambda model: nullcontext()},
        exact=peers.eager,
        ours=peers.accelerated,
        operation=mode,
        sizes=f"transformers' {peers.STYLES[style][0]}, {shape}, {sizes}",
        outputs=("logits", "dembedding") if mode == TRAINING else ("logits",),
        inputs=partial(_tokens, options["vocab_size"], length),
        checked=partial(_first, CHECKED_TOKENS),
        backend=partial(_replaced, build),
        tokens=n,
        **_work(mode, 0 if small else PARAMETERS[style], n),
    )


def cases(small: bool = False) -> Iterator[Case]:
    """Training and generation of every preset and, where it is installed, of transformers' models."""
    found = [
        small_lm_case(preset, mode, small) for mode in (TRAINING, GENERATION) for preset in SMALL_LM_TOKENS
    ]
    if importlib.util.find_spec("transformers"):
        found += [style_case(style, mode, small) for mode in (TRAINING, GENERATION) for style in STYLE_TOKENS]
    for case in found:
        yield case if small else replace(case, bars=BARS.get(case.name, ()))
