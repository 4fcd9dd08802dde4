"""FSDP2 under Lightning, `trainer.strategy: fsdp2`: of a diffusion model's weights, gradients, averages and moments each
process keeps a share. Checkpoints are whole, the same files that one process or DDP writes: a run goes on under either."""

from typing import Any

import torch
from pytorch_lightning.strategies import DDPStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import register_dataclass, tree_map

from ldm.common.files import OnAllRanks
from ldm.cond import Cond

NAME = "fsdp2"
CALLED = ("with_dropout", "with_null", "null")  # methods of a conditioner that use its weights, beside its call

register_dataclass(Cond)  # FSDP looks for tensors that need gradients in what goes in and out


class Sharded(DDPStrategy):
    """As DDP, but the module is not wrapped: its parts are sharded in place, and whole again in what is saved."""

    sharded = True

    def configure_ddp(self) -> None:
        shard(self.lightning_module, init_device_mesh(self.root_device.type, (self.world_size,)))

    def optimizer_step(self, *given: Any, **named: Any) -> Any:
        """A pass without a backward one (validation, drawing) leaves some weights whole: now they are old, and given up."""
        found = super().optimizer_step(*given, **named)
        for part in self.lightning_module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
        return found

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """On rank 0; nothing on the others, all of which have to call."""
        whole_ones = ((name, whole(value)) for name, value in self.lightning_module.state_dict().items())
        return {name: value for name, value in whole_ones if self.is_global_zero}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return tree_map(whole, super().optimizer_state(optimizer))

    def load_optimizer_state_dict(self, checkpoint: dict[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            state = {number: {name: share(value, p) for name, value in saved["state"][number].items()}
                     for number, p in zip(numbers, weights, strict=True) if number in saved["state"]}  # fmt: skip
            optimizer.load_state_dict({**saved, "state": state})

    def teardown(self) -> None:
        """Without a move to the CPU, where the shares could not be put together to be saved."""
        for part in (self.precision_plugin, self.accelerator, self.checkpoint_io):
            part.teardown()


StrategyRegistry.register(NAME, Sharded, description="FSDP2: weights, gradients and moments in shares")


def shard(module: Any, mesh: DeviceMesh) -> None:
    """Replaces the trained weights of a DiffusionModule, and their averages, by this process's share of them.

    Raises:
        UserError: where a trained weight lies outside of what is sharded; its gradients would differ from rank to rank.
    """
    trained = [name for name, part in module.model.items() if any(p.requires_grad for p in part.parameters())]
    models = [module.model] if module.ema is None else [module.model, module.ema.shadow]
    for part in (model[name] for model in models for name in trained):
        _shard(getattr(part, "network", part), mesh)
        for method in CALLED:
            register_fsdp_forward_method(part, method)
    if module.loss.uncertainty is not None:
        _shard(module.loss.uncertainty, mesh)
    if left := [name for name, p in module.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]:
        raise OnAllRanks(f"trainer.strategy: {NAME} does not know how to share out {left[0]}; take ddp")


def _shard(part: nn.Module, mesh: DeviceMesh) -> None:
    """Blocks on their own, so that one after the other is put together where it is used, and what is left of the part."""
    part.to(memory_format=torch.contiguous_format)  # it takes no other
    for blocks in part.children() if not isinstance(part, nn.ModuleList) else ():
        for block in blocks if isinstance(blocks, nn.ModuleList) else ():
            fully_shard(block, mesh=mesh)
    fully_shard(part, mesh=mesh)


def whole(value: Any) -> Any:
    """A shared tensor put together, on the CPU; anything else as it is. All ranks have to call."""
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def share(value: Any, p: Tensor) -> Any:
    """This process's share of a whole tensor that belongs to the weight ``p``; anything else as it is."""
    if not isinstance(p, DTensor) or not isinstance(value, Tensor) or value.shape != p.shape:
        return value
    return distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
