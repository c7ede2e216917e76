"""Every bundled model, small, in each of its forms."""

import torch

from aeup.models import MODELS

TINY = dict(image_size=(12, 10), latent_dim=3, channels=(6, 4, 4), hidden=8)
FLOW = dict(posterior="flow", flow_hidden=8)
GAN = dict(image_size=(16, 24), in_channels=1, width=4, latent_dim=5)
SEGMENT = dict(image_size=(40, 35), classes=3, channels=(4, 5, 6, 7, 8))

CASES = {
    "ae": ("ae", TINY),
    "ae-squared": ("ae", {**TINY, "loss": "squared"}),
    "ae-mlp": ("ae", {**TINY, "network": "mlp", "depth": 2}),
    "denoising-gaussian": ("denoising", TINY),
    "denoising-mask": ("denoising", {**TINY, "corruption": "mask"}),
    "denoising-salt_pepper": ("denoising", {**TINY, "corruption": "salt_pepper", "in_channels": 3}),
    "sparse": ("sparse", TINY),
    "sparse-l1": ("sparse", {**TINY, "penalty": "l1"}),
    "contractive": ("contractive", {**TINY, "depth": 0}),
    "contractive-deep": ("contractive", {**TINY, "network": "conv", "depth": 1, "jacobian": "hutchinson"}),
    "vae": ("vae", TINY),
    "vae-flow": ("vae", {**TINY, **FLOW}),
    "vae-mlp": ("vae", {**TINY, "network": "mlp", "kl_warmup": 0.5, "beta": 4.0}),
    "vae-gaussian": ("vae", {**TINY, "likelihood": "gaussian", "in_channels": 3}),
    "dcgan": ("dcgan", GAN),
    "dcgan-nearest": ("dcgan", {**GAN, "image_size": (28, 28), "in_channels": 3, "upsample": "nearest"}),
    "fcn": ("fcn", SEGMENT),
    "fcn-32s": ("fcn", {**SEGMENT, "head": "32s", "in_channels": 3}),
    "fcn-bilinear": ("fcn", {**SEGMENT, "head": "16s", "upsample": "bilinear"}),
}


def build(case, **more):
    """The model of a case, always with the same weights; a flow is moved away from its start, the identity."""
    name, options = CASES[case]
    torch.manual_seed(0)
    model = MODELS[name](MODELS[name].Config(**{**options, **more}))
    for block in model.flow.blocks if getattr(model, "flow", None) else ():
        torch.nn.init.normal_(block.output.weight, std=0.5)
    return model


def batch(model, n=4):
    """Images and, for a model that wants them, labels."""
    c = model.config
    random = torch.Generator().manual_seed(1)
    x = torch.rand(n, c.in_channels, *c.image_size, generator=random)
    return x, torch.randint(c.classes, (n, *c.image_size), generator=random) if model.targets else None


def losses(model, x, target=None, seed=2):
    """All players' losses, with the same noise at every call."""
    found = {}
    for player in model.players():
        torch.manual_seed(seed)
        found |= model.loss(x, target, player)
    return found


def fit(model, x, target=None, steps=100, size=50, lr=3e-3, seed=0):
    """A small training run: Adam and a cosine."""
    torch.manual_seed(seed)
    optimizers = {k: torch.optim.Adam(p.parameters(), lr=lr, fused=True) for k, p in model.players().items()}
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, steps) for o in optimizers.values()]
    model.train()
    for step in range(steps):
        model.set_progress(step, steps)
        index = torch.randint(len(x), (size,))
        for player, optimizer in optimizers.items():
            optimizer.zero_grad()
            model.loss(x[index], None if target is None else target[index], player)[model.minimise[player]].backward()
            optimizer.step()
        for schedule in schedules:
            schedule.step()
    return model.eval()
