"""python tools/bottleneck.py: how much better would a concept be drawn, if more than a word were learned?

The UNet is told of a prompt through the keys and values of its cross-attention. One vector of a word moves
these only as far as the text encoder lets it. Here the same photos are learned with more and more freedom,
the UNet and everything behind it frozen, always for the prompt "a photo of a WORD":

    1 vector, 2 vectors   rows in the table of word vectors: Textual Inversion
    per layer             one row for each cross-attention layer (arXiv 2303.09522)
    context               the output of the text encoder, all tokens of it
    keys and values       what the cross-attention layers make of that

If more freedom brings no lower loss, the UNet is what limits the pictures; if it does, the space of words is.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image
from torch import Tensor

import minti
from minti.cli.command import run_command
from minti.cli.images import image_grid
from minti.cli.options import Parser, number
from minti.cli.progress import Progress
from minti.errors import InputError
from minti.formats.atomic import write_atomically
from minti.formats.photos import load_photos
from minti.formats.views import make_views
from minti.inversion.batches import Batch, Settings, Word, sample_batch
from minti.inversion.latents import encode_views
from minti.inversion.start import word_rows
from minti.model.stable_diffusion import StableDiffusion
from minti.study.classifier import Judge
from minti.study.concepts import read_concepts

PROMPT = "a photo of a {}"
Told = Callable[[], Tensor]  # -> (1, 77, sum of kv_width), what `UNet.denoise` is told of the prompt


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python tools/bottleneck.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("weights/tiny"))
    parser.add_argument(
        "--concepts", default="weights/tiny/concepts/concepts.yaml", help="YAML file of concepts"
    )
    parser.add_argument("--concept", default="imp", help="one of them")
    parser.add_argument("--steps", type=number(int, 1), default=300)
    parser.add_argument("--lr", type=number(float, 0), default=1e-2, help="falls along a cosine")
    parser.add_argument("--batch-size", type=number(int, 1), default=4)
    parser.add_argument("--eval-size", type=number(int, 1), default=512, help="fixed samples for the loss")
    parser.add_argument("--num-images", type=number(int, 1), default=32)
    parser.add_argument("--sample-steps", type=number(int, 1), default=25)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--seed", type=number(int, 0), default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bottleneck"), help="folder for table and pictures"
    )
    return parser.parse_args(argv)


def freedoms(sd: StableDiffusion, init_word: str) -> Iterator[tuple[str, list[Tensor], Told]]:
    """What can be learned: its name, the tensors that are free, and what the UNet is told with them.

    Each begins with what the UNet is told of the init word.
    """
    transformers = [transformer for block in sd.unet.blocks for transformer in block.attentions]
    layers = [block.attn2 for transformer in transformers for block in transformer.transformer_blocks]

    def add(name: str, num_vectors: int) -> tuple[Tensor, Told]:
        word = f"<bottleneck-{name}>"
        rows = sd.add_concept(minti.Concept(word, word_rows(sd, init_word, num_vectors)))
        ids = sd.tokenizer([PROMPT.format(word)]).to(sd.device)
        return rows.requires_grad_(True), lambda: sd.text_encoder(ids).context

    for name, count in (("1 vector", 1), ("2 vectors", 2)):
        rows, context = add(f"{count}", count)
        yield name, [rows], lambda context=context: sd.unet.embed_context(context())

    words = [add(f"layer-{i}", 1) for i in range(len(layers))]

    def per_layer() -> Tensor:
        contexts = [context() for _, context in words]
        told = [
            project(c)
            for c, layer in zip(contexts, layers, strict=True)
            for project in (layer.to_k, layer.to_v)
        ]
        return torch.cat(told, dim=-1)

    yield "per layer", [rows for rows, _ in words], per_layer

    start = sd.encode_prompt([PROMPT.format(init_word)])
    free = start.clone().requires_grad_(True)
    yield "context", [free], lambda: sd.unet.embed_context(free)

    kv = sd.unet.embed_context(start).detach().clone().requires_grad_(True)
    yield "keys and values", [kv], lambda: kv


def loss_of(sd: StableDiffusion, told: Tensor, word: Word, batch: Batch) -> Tensor:
    """The diffusion loss with what the UNet is told, (1, 77, ...): a scalar."""
    batch = batch.to(sd.device)
    x0, _, _ = word.latents_at(batch)
    x_t = sd.schedule.q_sample(x0, batch.eps, batch.t).to(sd.dtype)
    prediction = sd.unet.denoise(x_t, sd.unet.embed_time(batch.t), told.expand(len(x_t), -1, -1))
    return torch.nn.functional.mse_loss(prediction.float(), sd.schedule.target(x0, batch.eps, batch.t))


def learn(
    sd: StableDiffusion, free: list[Tensor], told: Told, word: Word, args: argparse.Namespace, name: str
) -> None:
    optimizer = torch.optim.AdamW(free, args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    T, progress = sd.schedule.config.num_train_timesteps, Progress(args.steps, "step")
    for step in range(args.steps):
        optimizer.zero_grad()
        loss = loss_of(sd, told(), word, sample_batch(word, Settings(), T, args.batch_size, step))
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.step(f"{name}: loss {loss.item():.3f}")
    progress.close()
    for tensor in free:
        tensor.requires_grad_(False)


@torch.no_grad()
def evaluate(sd: StableDiffusion, told: Tensor, word: Word, args: argparse.Namespace) -> float:
    """The mean loss on samples that are the same for every freedom."""
    T, n = sd.schedule.config.num_train_timesteps, args.eval_size
    batch = sample_batch(word, Settings(), T, n, "evaluation")
    losses = [loss_of(sd, told, word, batch[i : i + 32]) * len(batch.t[i : i + 32]) for i in range(0, n, 32)]
    return sum(losses).item() / n


@torch.no_grad()
def paint(sd: StableDiffusion, told: Tensor, args: argparse.Namespace) -> list[Image.Image]:
    """Guided pictures, as `StableDiffusion.sample` makes them, one for each seed."""
    without = sd.unet.embed_context(sd.encode_prompt([""]))

    def predict(x_t: Tensor, t: int) -> Tensor:
        n = len(x_t)
        both = torch.cat([without.expand(n, -1, -1), told.expand(n, -1, -1)])
        shift = sd.unet.embed_time(torch.tensor([t], device=sd.device))
        eps_without, eps_with = sd.unet.denoise(x_t.to(sd.dtype), shift, both).float().chunk(2)
        return eps_without + args.guidance_scale * (eps_with - eps_without)

    w, h = (n // sd.vae.config.downscale for n in sd.image_size)
    shape, images = (1, sd.vae.config.latent_channels, h, w), []
    for first in range(0, args.num_images, 16):
        seeds = range(first, min(first + 16, args.num_images))
        x_T = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
        *_, latents = sd.schedule.ddim_sample(predict, x_T.to(sd.device), args.sample_steps)
        images += sd.decode_latents(latents)
    return images


def main(argv: Sequence[str] | None) -> None:
    args = arguments(argv)
    concepts = read_concepts(args.concepts)
    if args.concept not in concepts:
        raise InputError(f"--concept {args.concept}: {args.concepts} has {', '.join(concepts)}")
    concept = concepts[args.concept]
    sd = minti.load(args.checkpoint, device=args.device)
    if sd.unet.add_embedding is not None or sd.unet.config.in_channels != 4:
        raise InputError(f"{args.checkpoint}: works with plain text-to-image models, not SDXL or inpainting")
    judge = Judge.load(args.checkpoint)
    photos = load_photos(concept.images)
    latents = encode_views(sd, make_views(photos, sd.image_size[0], flip=True))
    word = Word("<photos>", word_rows(sd, concept.init_word, 1), latents, seed=args.seed)
    facts = [fact for fact in concept.facts if judge]
    lines = [" | ".join(["", "free numbers", "loss", *facts]), "|---" * (3 + len(facts)) + "|"]
    lines[0] = f"| {lines[0]} |"
    sheet: list[Image.Image] = []

    def record(name: str, numbers: int, told: Tensor) -> None:
        images = paint(sd, told, args)
        sheet.extend(images[:8])
        readings = judge.read(images) if judge else None
        shares = [
            f"{sum(r[f] == concept.facts[f] for r in readings) / len(readings):.0%}" if readings else ""
            for f in facts
        ]
        loss = evaluate(sd, told, word, args)
        lines.append("| " + " | ".join([name, f"{numbers:,}", f"{loss:.4f}", *shares]) + " |")
        print(lines[-1], flush=True)

    print("\n".join(lines), flush=True)
    record(
        f"the word {concept.init_word}",
        0,
        sd.unet.embed_context(sd.encode_prompt([PROMPT.format(concept.init_word)])),
    )
    for name, free, told in freedoms(sd, concept.init_word):
        learn(sd, free, told, word, args, name)
        record(name, sum(tensor.numel() for tensor in free), told())
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out / "table.md", ("\n".join(lines) + "\n").encode())
    image_grid(sheet, 8).save(args.out / "sheet.png")
    print(f"wrote {args.out / 'table.md'} and {args.out / 'sheet.png'}, a row of pictures for each line")


if __name__ == "__main__":
    run_command("bottleneck", main)
