"""Ten steps here and in a plain loop of torch, side by side."""

import jax
import numpy as np
from helpers import data, started

import specjax as sj
from specjax.train.step import make_train_step, split, write_back

STEPS, RATE, DECAY, CLIP = 10, 3e-3, 0.1, 1.0


def packed(**options):
    return data(**{"vocab_size": 517, "batch_size": 4, "answers": True} | options)


def micro(batch, parts):
    """[B,T] arrays as [k,b,T]."""
    return {name: value.reshape(parts, -1, value.shape[1]) for name, value in batch.items()}


def our_losses(of, trainable, rows, parts=2):
    """Losses and gradient norms of each step; the model is trained in place."""
    graph, params, frozen = split(of, trainable)
    optimizer = sj.adamw(RATE, weight_decay=DECAY, clip_norm=CLIP)
    step = jax.jit(make_train_step(graph, optimizer))
    state, found = started(optimizer, params), []
    for number in range(STEPS):
        state, metrics = step(state, frozen, micro(rows.batch(number), parts), np.int32(number))
        found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    write_back(of, state.trainable)
    return np.array(found)


def torch_losses(of, rows):
    """The same of a plain loop: torch's AdamW and clip, cross-entropy over whole batches."""
    import torch

    trained = {name: weight for name, weight in of.named_parameters() if weight.requires_grad}
    spared = [weight for name, weight in trained.items() if "norm." in name or name.endswith("bias")]
    decayed = [weight for weight in trained.values() if all(weight is not other for other in spared)]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=RATE)
    found = []
    for number in range(STEPS):
        batch = {name: torch.tensor(value) for name, value in rows.batch(number).items()}
        segments, length = batch["segment_ids"], rows.length
        seen = (segments[:, :, None] == segments[:, None, :]) & torch.ones(length, length).tril().bool()
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]
        logits = of(
            input_ids=batch["tokens"].long(), attention_mask=mask, position_ids=batch["positions"].long()
        ).logits
        nll = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["targets"].long().flatten(), reduction="none"
        )
        counted = batch["loss_mask"].flatten()
        loss = (nll * counted).sum() / counted.sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), CLIP)
        optimizer.step()
        found.append((loss.item(), norm.item()))
    return np.array(found)


def assert_same_course(found, wanted):
    print(f"losses differ by {np.abs(found[:, 0] / wanted[:, 0] - 1).max():.1e} of themselves")
    assert wanted[-1, 0] < wanted[0, 0] - 0.1
    assert wanted[:, 1].max() > CLIP  # or the clip is not seen
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def assert_same_movement(found, wanted, start):
    """Weights by name: they differ by little of the way they went, taken together (Adam divides by small ones)."""
    for name, value in wanted.items():
        apart, way = np.linalg.norm(found[name] - value), np.linalg.norm(value - start[name])
        assert apart < 2e-3 * way, (name, apart, way)
