"""Names of other trainers and their replacements here: one table for all messages."""

from __future__ import annotations

import re
from collections.abc import Mapping


def _inverted(names: Mapping[str, str]) -> Mapping[str, str]:
    """The replacement by name, from the names by their replacement."""
    return {name: ours for ours, theirs in names.items() for name in theirs.split()}


METHODS: Mapping[str, str] = _inverted(
    {
        "train_step": "training_step compute_loss",
        "val_step": "validation_step prediction_step",
        "test_step": "predict_step",
        "get_optimizers_schedulers": (
            "configure_optimizers create_optimizer create_scheduler create_optimizer_and_scheduler"
        ),
        "get_train_dataloader": "train_dataloader",
        "get_val_dataloaders": "val_dataloader get_eval_dataloader",
        "get_test_dataloaders": "test_dataloader predict_dataloader",
        "on_begin_train_epoch": (
            "on_fit_start on_train_start on_train_epoch_start on_train_begin on_epoch_begin on_epoch_start "
            "on_epoch_started before_fit before_epoch"
        ),
        "on_end_train": "on_fit_end on_train_end after_fit fit_end",
        "on_end_train_epoch": (
            "on_train_epoch_end training_epoch_end on_epoch_end on_epoch_completed after_epoch epoch_end"
        ),
        "on_end_train_step": (
            "training_step_end on_train_batch_start on_train_batch_end on_before_zero_grad on_step_begin on_step_end "
            "on_batch_begin on_batch_start on_batch_end on_train_batch_begin on_iteration_completed before_batch "
            "after_batch after_step batch_end"
        ),
        "on_begin_val_epoch": "on_validation_start on_validation_epoch_start on_test_begin",
        "on_end_val_epoch": (
            "on_validation_epoch_end on_validation_end on_validation_batch_end on_val_epoch_end validation_epoch_end "
            "validation_step_end on_evaluate after_validate eval_end"
        ),
        "on_end_test_epoch": "on_test_end on_test_epoch_end test_epoch_end",
        "on_end_backward": "on_before_backward on_after_backward on_substep_end after_backward",
        "get_state of a module and state_dict of a callback": "on_save_checkpoint",
        "update_state of a module and load_state_dict of a callback": "on_load_checkpoint",
        "catch the exception of Trainer.train()": "on_exception",
        "set clip_grads and max_grad_norm in TrainerArguments": "configure_gradient_clipping",
        "return the schedulers from get_optimizers_schedulers": "lr_scheduler_step",
        "the trainer clears the gradients": "optimizer_zero_grad",
        "give the Trainer callbacks=[...]": "configure_callbacks",
        "on_before_optimizer_step": "on_pre_optimizer_step on_optimizer_step",
        "give the Trainer a sink": "on_log on_save",
    }
)
"""Methods and hooks of modules and callbacks of Lightning, Hugging Face, Keras, ignite, fastai and Composer.
Each value is our name, or a sentence."""

ATTRIBUTES: Mapping[str, str] = {
    "trainer": "every hook receives global_step; pass other values to __init__",
    "device": "every step receives the device as its third argument",
    "current_epoch": "on_begin_train_epoch receives the epoch",
    "global_step": "every step and hook receives global_step as its first argument",
    "global_rank": "the rank is that of torch.distributed",
    "local_rank": "the rank is that of torch.distributed",
    "hparams": "keep hyperparameters in __init__, and record them with Trainer(config=...)",
    "logger": "record values with self.log(name, value), and give the Trainer sinks=[...]",
    "loggers": "record values with self.log(name, value), and give the Trainer sinks=[...]",
    "optimizers": "keep the optimizers that get_optimizers_schedulers returns as attributes of the module",
    "example_input_array": "the trainer needs no example input",
    "automatic_optimization": "set manual_optimization",
    "is_global_zero": "the rank is that of torch.distributed",
}
"""Attributes that the code of modules and callbacks reads."""

CALLS: Mapping[str, str] = {
    "log_metrics": "call self.log(name, value), or self.log_dict(values)",
    "save_hyperparameters": "keep hyperparameters in attributes, and record them with Trainer(config=...)",
    "lr_schedulers": "keep the schedulers of get_optimizers_schedulers in attributes",
    "manual_backward": "set manual_optimization = True and call self.optimize(loss, optimizer)",
    "toggle_optimizer": "set requires_grad of the parameters",
    "load_from_checkpoint": "build the module and give the Trainer resume, or init_from for weights alone",
}
"""Methods that the code of modules and callbacks calls."""

TRAIN_ARGUMENTS: Mapping[str, str] = _inverted(
    {
        "give the Trainer resume": "resume_from_checkpoint ckpt_path resume",
        "give the Trainer the module": "model module",
        "set epochs in TrainerArguments": "epochs max_epochs",
        "return the data from get_train_dataloader of the module": "train_dataloaders",
        "return the data from get_val_dataloaders of the module": "val_dataloaders",
        "return the data from get_val_dataloaders or get_test_dataloaders of the module": "dataloaders",
        "return the data from the methods of the module": "datamodule",
        "give the Trainer callbacks": "callbacks",
    }
)
"""Arguments of `Trainer.train` and `Trainer.test`, which accept none."""

TRAINER_METHODS: Mapping[str, str] = {
    "fit": "build Trainer(module, arguments) and call train()",
    "evaluate": "call validate(), or test() for the test data",
    "predict": "call test(), which returns the outputs of test_step",
    "resume_from_checkpoint": "build Trainer(..., resume=path) and call train()",
    "save_checkpoint": "give the Trainer checkpoints=Checkpoints(...), or await run.checkpoint() inside Trainer.run()",
    "save_model": "result.weights is the file with the weights after the run",
    "add_callback": "build Trainer(..., callbacks=[...])",
    "log": "call self.log(name, value) in a module or a callback",
    "log_metrics": "call self.log(name, value) in a module or a callback",
    "logged_metrics": "train() returns a result with metrics",
    "callback_metrics": "train() returns a result with metrics",
    "global_step": "train() returns a result with global_step",
    "current_epoch": "train() returns a result with epochs",
    "should_stop": "call run.stop() inside Trainer.run(), or give a callback should_stop(global_step, metrics)",
    "model": "the module is in trainer.module",
    "optimizer": "get_optimizers_schedulers of the module returns the optimizers",
    "logger": "give the Trainer sinks=[...]",
    "state": "train() returns a result",
    "is_global_zero": "the rank is that of torch.distributed",
    "hyperparameter_search": "build one Trainer for each trial",
    "tune": "call find_batch_size(module, arguments), or find_learning_rate(module, arguments)",
    "tuner": "call find_batch_size(module, arguments), or find_learning_rate(module, arguments)",
}
"""Methods and attributes of a trainer."""

ARGUMENTS: Mapping[str, str] = _inverted(
    {
        "non_finite": "non_finite_loss",
        "epochs": "max_epochs num_epochs n_epochs num_train_epochs nb_epochs",
        "max_steps": "total_steps num_steps num_training_steps fast_dev_run",
        "set it in get_optimizers_schedulers": (
            "lr learning_rate weight_decay momentum optim optimizer scheduler lr_scheduler lr_scheduler_type "
            "warmup_steps warmup_ratio"
        ),
        "train_batch_size": "batch_size per_device_train_batch_size per_gpu_train_batch_size global_batch_size",
        "batch_size_schedule": "accumulation_schedule scheduling rampup_batch_size",
        "val_batch_size": "eval_batch_size per_device_eval_batch_size",
        "gpu_batch_size_limit": "micro_batch_size gradient_accumulation_steps accumulate_grad_batches",
        "call find_batch_size(module, arguments)": "auto_find_batch_size auto_scale_batch_size",
        "call find_learning_rate(module, arguments)": "auto_lr_find",
        "use max_grad_norm with clip_grads=True": "gradient_clip_val gradient_clip grad_clip clip_grad_norm max_norm",
        "use clip_grads, which clips the norm": "gradient_clip_algorithm",
        "device": "accelerator use_cpu no_cuda use_cuda",
        "start the script with torchrun --nproc-per-node=N": "devices gpus num_nodes num_processes",
        "use strategy=Ddp(find_unused_parameters=True)": "ddp_find_unused_parameters find_unused_parameters",
        "use strategy=Ddp(sync_batch_norm=True)": "sync_batchnorm",
        "use strategy=Ddp(bucket_cap_mb=25)": "ddp_bucket_cap_mb",
        "collective_timeout_s": "ddp_timeout",
        "build the DataLoader with the given sampler": "use_distributed_sampler replace_sampler_ddp",
        "use precision='float16'": "fp16",
        "use precision='bfloat16'": "bf16",
        "precision": "amp mixed_precision dtype",
        "compile": "torch_compile",
        "max_train_steps_per_epoch": "limit_train_batches steps_per_epoch overfit_batches",
        "max_val_steps_per_epoch": "limit_val_batches validation_steps",
        "val_interval_epochs": "check_val_every_n_epoch validation_freq",
        "val_interval_steps": "eval_steps eval_interval",
        "validate_at_start": "eval_on_start num_sanity_val_steps",
        "max_time_s": "max_time",
        "use val_interval_epochs or val_interval_steps": "eval_strategy evaluation_strategy val_check_interval",
        "give the Trainer checkpoints=Checkpoints(best=...)": "metric_for_best_model load_best_model_at_end",
        "every step is published; give a sink its own interval": "logging_steps log_every_n_steps",
        "give the Trainer run_dir": "logging_dir log_dir output_dir default_root_dir",
        "give the Trainer run_id": "run_name",
        "give the Trainer sinks=[...]": "report_to",
        "give the Trainer checkpoints=Checkpoints(every_steps=...)": "save_steps",
        "give the Trainer checkpoints=Checkpoints(...)": "save_strategy",
        "give the Trainer checkpoints=Checkpoints(keep_last=...)": "save_total_limit",
        "give the Trainer resume": "resume_from_checkpoint",
        "use seed, and call torch.use_deterministic_algorithms(True) yourself": "deterministic",
        "set torch.backends.cudnn.benchmark yourself": "benchmark",
        "seed": "random_seed data_seed",
        "set it in get_train_dataloader": "dataloader_num_workers num_workers",
        "call torch.autograd.set_detect_anomaly(True) yourself": "detect_anomaly",
        "give the Trainer callbacks=[trainer.callbacks.Profiler()]": "profiler",
        "give the Trainer sinks=[...] without the console": "enable_progress_bar disable_tqdm",
    }
)
"""Arguments of a run: a field of `TrainerArguments`, or a sentence."""

TRAINER_ARGUMENTS: Mapping[str, str] = _inverted(
    {
        "module": "model",
        "arguments": "args training_args",
        "sinks": "logger loggers log sink",
        "callbacks": "callback",
        "checkpoints": "checkpoint enable_checkpointing checkpoint_callback",
        "resume": "resume_from_checkpoint ckpt_path",
        "run_dir": "default_root_dir output_dir save_dir",
        "run_id": "run_name name",
        "config": "hparams",
        "return the data from get_train_dataloader of the module": "train_dataset train_dataloader train_dataloaders",
        "give the DataLoader collate_fn in get_train_dataloader of the module": "data_collator",
        "return the data from get_val_dataloaders of the module": "eval_dataset val_dataloaders",
        "return the data from get_train_dataloader and get_val_dataloaders of the module": "datamodule",
        "return the optimizers from get_optimizers_schedulers of the module": "optimizers optimizer",
        "compute metrics in on_end_val_epoch and record them with self.log": "compute_metrics",
        "compute the loss in train_step of the module": "compute_loss_func",
    }
)
"""Arguments of `Trainer`: our name, or a sentence."""


def hint_for(error: BaseException, owner: type) -> str | None:
    """The replacement for a name of another trainer that user code used; None for any other error.

    Args:
        owner: The base of modules and callbacks.
    """
    if isinstance(error, AttributeError) and isinstance(error.obj, owner):
        served = ATTRIBUTES.get(error.name or "")
        return f"{type(error.obj).__name__} has no {error.name}; {served}" if served is not None else None
    if type(error) is TypeError:  # not a subclass of the user's, which may have any text
        unexpected = re.search(r"\blog(?:_dict)?\(\) got an unexpected keyword argument '(\w+)'", str(error))
        if unexpected is not None:
            advice = "use reduce" if unexpected[1] == "reduce_fx" else "remove it, because each step's mean is recorded"
            return f"log(name, value) has no argument {unexpected[1]}; {advice}"
    return None
