"""What PyTorch says about a GPT-2, and how far PyTorch's own float32 and bf16 are from it.

A model, a batch of tokens and a recipe for AdamW give one table of named results, the same names
that `train_gpt2 dump` writes: loss, logits (B,T,V), grad.NAME, and after N optimizer steps losses
(N) and param.NAME, where NAME is that of the transformers state dict. Results in float64 are the
reference.

How well can float32 do? One float32 evaluation is one sample of a rounding error: for a scalar such
as the loss it may be nearly 0 by luck. So the same function is evaluated several times, each time
in another order: the vocabulary, the residual channels, the hidden units of the MLP, the heads, the
channels within a head and the sequences of the batch are permuted, which changes the order of every
sum and nothing else, and attention alternates between the two implementations of transformers,
eager and sdpa. The largest distance of any of them from the reference is PyTorch's error for that
tensor.

In bf16 the same is asked of a model in bf16, as people train one: parameters and AdamW in float32,
of which the model holds a copy rounded to bf16 before each forward pass; its gradients are cast to
float32, and logits too before the loss is taken of them, as transformers itself does. The rounding
of the copy is part of the error, and most of it; another order does not change it. So in bf16 each
evaluation also starts from other parameters, within half a unit in the last place of bf16 of the
model's, and is held against float64 for those.
"""

import copy
import re
from dataclasses import dataclass

import numpy
import torch
import torch.nn.functional as F
import transformers
from transformers import GPT2LMHeadModel

IGNORE = -1  # a target that takes no part

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # the order of a sum must not depend on the machine


@dataclass
class Recipe:
    """torch.optim.AdamW on one batch; matrices decay, vectors do not."""

    steps: int = 10
    learning_rate: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0


# ==== a bound ====================================================================================


# what PyTorch computes in, by the names under which fixtures store its errors
KINDS = {"32": torch.float32, "64": torch.float64, "bf16": torch.bfloat16}


def unit_roundoff(kind):
    """Half the distance from 1 to the next number: what rounding one result costs at most."""
    return torch.finfo(KINDS[kind]).eps / 2


def bound(error, largest, kind):
    """The largest error that passes: twice PyTorch's own.

    A tensor of few elements can be right in PyTorch by luck, even exactly; no program can be asked
    for less than the rounding of its results, so PyTorch's error counts as at least one unit
    roundoff of the largest element of the tensor."""
    return 2 * torch.clamp(error, min=unit_roundoff(kind) * largest)


# ==== one evaluation =============================================================================


def build(config, dtype, attention="eager"):
    config = copy.deepcopy(config)
    config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.0
    model = GPT2LMHeadModel(config).to(dtype)
    model.set_attn_implementation(attention)
    return model


def is_trained(config, name):
    """A model made without biases holds zeros in their place, and they stay zero."""
    return getattr(config, "bias", True) or not name.endswith(".bias")


def split(tokens):
    """tokens (B, T+1) -> inputs and targets (B, T); -1 is no target, and 0 where it is an input."""
    return tokens[:, :-1].clamp(min=0), tokens[:, 1:]


def evaluate(model, state, batch, recipe, autocast=False):
    """The table of results for one model in its own dtype, as float64; batch: inputs and targets
    (B, T). AdamW works on float32 parameters where the model is in bf16. With `autocast` parameters
    stay as they are, and PyTorch rounds what products read, and their results, to bf16."""
    model.load_state_dict(state)
    model.tie_weights()
    model.train()
    inputs, targets = batch
    narrow = model.dtype == torch.bfloat16
    held = {n: p for n, p in model.named_parameters() if is_trained(model.config, n)}
    parameters = {n: state[n].float().clone() for n in held} if narrow else held

    def forward_backward():
        model.zero_grad(set_to_none=True)
        if narrow:
            with torch.no_grad():
                for name, copy_of in held.items():
                    copy_of.copy_(parameters[name])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = model(inputs, use_cache=False).logits
        judged = logits.float() if narrow or autocast else logits
        loss = F.cross_entropy(judged.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        loss.backward()
        if narrow:
            for name, copy_of in held.items():
                parameters[name].grad = copy_of.grad.float()
        return loss.detach(), logits.detach()

    loss, logits = forward_backward()
    result = {"loss": loss.reshape(1), "logits": logits}
    result |= {f"grad.{n}": p.grad.detach().clone() for n, p in parameters.items()}
    if recipe.steps > 0:
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters.values() if p.dim() >= 2]},
                {"params": [p for p in parameters.values() if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.epsilon,
            weight_decay=recipe.weight_decay,
        )
        losses = []
        for step in range(recipe.steps):
            losses.append(loss if step == 0 else forward_backward()[0])
            if recipe.grad_clip > 0:
                torch.nn.utils.clip_grad_norm_(parameters.values(), recipe.grad_clip)
            optimizer.step()
        result["losses"] = torch.stack(losses)
        result |= {f"param.{n}": p.detach().clone() for n, p in parameters.items()}
    return {name: value.double() for name, value in result.items()}


# ==== models and batches to try ==================================================================


def random_state(config, draw, scale=0.3):
    """Parameters far from their usual initial values, so that no term is trivially 0 or 1 and
    neither the attention weights nor the next-token distribution is flat; `scale` is that of the
    products' weights."""
    state = {}
    for name, value in build(config, torch.float64).state_dict().items():
        noise = draw.standard_normal(tuple(value.shape))
        if name.endswith("bias"):
            numbers = 0.1 * noise
        elif "ln_" in name:
            numbers = 1 + 0.2 * noise
        elif value.dim() == 2 and not name.endswith(("wte.weight", "wpe.weight")):
            numbers = scale * noise
        else:
            numbers = 0.2 * noise
        state[name] = torch.tensor(numbers).float()
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    return state


def random_tokens(config, draw, B, T, ignored):
    tokens = torch.tensor(draw.integers(0, config.vocab_size, (B, T + 1)))
    # the later a sequence stands in the batch, the more of it is ignored
    share = ignored * 2 * (numpy.arange(B) + 1)[:, None] / (B + 1)
    tokens[torch.tensor(draw.random((B, T + 1)) < share)] = IGNORE
    return tokens


# ==== the same function in another order =========================================================


class Reordering:
    """Permutations that leave what a GPT-2 computes as it is; apply() and undo() go there and
    back."""

    def __init__(self, config, batch, seed):
        draw = torch.Generator().manual_seed(seed)
        C, NH = config.n_embd, config.n_head
        HS, hidden = C // NH, config.n_inner or 4 * C

        def permutation(n):
            return torch.randperm(n, generator=draw)

        self.batch = permutation(batch)
        vocabulary, channels = permutation(config.vocab_size), permutation(C)
        self.vocabulary = vocabulary
        self.axes = {
            r"wte\.weight|lm_head\.weight": (vocabulary, channels),
            r"wpe\.weight": (None, channels),
            r"ln_.*": (channels,),
        }
        for layer in range(config.n_layer):
            units = permutation(hidden)
            heads = permutation(NH)[:, None] * HS
            # queries and keys share an order within a head, values have their own
            keys = (heads + torch.stack([permutation(HS) for _ in range(NH)])).flatten()
            values = (heads + torch.stack([permutation(HS) for _ in range(NH)])).flatten()
            qkv = torch.cat([keys, keys + C, values + 2 * C])
            self.axes |= {
                rf"h\.{layer}\.attn\.c_attn\.weight": (channels, qkv),
                rf"h\.{layer}\.attn\.c_attn\.bias": (qkv,),
                rf"h\.{layer}\.attn\.c_proj\.weight": (values, channels),
                rf"h\.{layer}\.mlp\.c_fc\.weight": (channels, units),
                rf"h\.{layer}\.mlp\.c_fc\.bias": (units,),
                rf"h\.{layer}\.mlp\.c_proj\.weight": (units, channels),
                rf"h\.{layer}\..*\.c_proj\.bias|h\.{layer}\.ln_.*": (channels,),
            }

    def axes_of(self, name):
        short = name.removeprefix("grad.").removeprefix("param.").removeprefix("transformer.")
        if short == "logits":
            return (self.batch, None, self.vocabulary)
        if short in ("loss", "losses"):
            return (None,)
        return next(axes for pattern, axes in self.axes.items() if re.fullmatch(pattern, short))

    def apply(self, name, value):
        for dimension, order in enumerate(self.axes_of(name)):
            if order is not None:
                value = value.index_select(dimension, order)
        return value

    def undo(self, name, value):
        for dimension, order in enumerate(self.axes_of(name)):
            if order is not None:
                value = value.index_select(dimension, order.argsort())
        return value

    def apply_to_batch(self, batch):
        inputs, targets = batch
        renamed = self.vocabulary.argsort()
        targets = torch.where(targets == IGNORE, IGNORE, renamed[targets.clamp(min=0)])
        return renamed[inputs][self.batch], targets[self.batch]


# ==== the reference and PyTorch's error ==========================================================


def parts(name):
    """How many tensors stand side by side, along the last axis, in the one of that name.

    c_attn holds query, key and value. They are judged apart, because the key's bias has no
    gradient: it adds the same to every score of a query, and softmax does not see it. What float32
    makes of that 0 is noise, which AdamW divides by its own size; the key's bias then wanders, at
    no cost, by whole learning rates."""
    return 3 if ".attn.c_attn." in name else 1


def largest_distances(name, result, reference):
    """Largest absolute difference of each part (parts); NaN counts as infinite."""
    difference = (result - reference).abs().nan_to_num(nan=float("inf"))
    return torch.stack([piece.max() for piece in difference.chunk(parts(name), dim=-1)])


def jittered(state, seed):
    """Parameters within a unit roundoff of bf16 of these, which it rounds another way."""
    draw = torch.Generator().manual_seed(seed)
    roundoff = unit_roundoff("bf16")
    return {
        name: value * (1 + roundoff * (2 * torch.rand(value.shape, generator=draw).double() - 1))
        for name, value in state.items()
    }


def pytorch_error(config, state, batch, recipe, reference, dtype, orders):
    """{name: largest distances (parts) from the reference} over the evaluations that `orders`, a
    range of integers, numbers; number 0 is the model as it stands."""
    errors = {name: torch.zeros(parts(name), dtype=torch.float64) for name in reference}
    models = [build(config, dtype, attention) for attention in ("eager", "sdpa")]
    exact = build(config, torch.float64)
    for index in orders:
        order = Reordering(config, len(batch[0]), seed=index)
        near, expected = state, reference
        if dtype == torch.bfloat16 and index > 0:
            near = jittered(state, seed=index)
            expected = evaluate(exact, near, batch, recipe)
        if index == 0:
            result = evaluate(models[0], state, batch, recipe)
        else:
            permuted = {name: order.apply(name, value) for name, value in near.items()}
            result = evaluate(models[index % 2], permuted, order.apply_to_batch(batch), recipe)
            result = {name: order.undo(name, value) for name, value in result.items()}
        for name, value in result.items():
            distances = largest_distances(name, value, expected[name])
            errors[name] = torch.maximum(errors[name], distances)
    return errors
