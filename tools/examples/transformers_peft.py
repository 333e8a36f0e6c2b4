"""Fine-tune adapters of PEFT with Hugging Face's Trainer, stop, resume, and export what from_pretrained loads.

    python tools/examples/transformers_peft.py

Only the adapters are saved. The run that is resumed ends as one that never stopped. The model is small and has not been
trained before, so that nothing is downloaded.
"""

from typing import Any

import peft
import torch
import transformers

import varstore as vs
from varstore.adapters.transformers import VarstoreCallback

CONFIG = transformers.BertConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
)


class Stop(transformers.TrainerCallback):
    """Stop at step 5, as Ctrl-C does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


def base() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(CONFIG)


def make_trainer(output: str, *callbacks: transformers.TrainerCallback) -> transformers.Trainer:
    adapter = peft.LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"])
    model = peft.get_peft_model(base(), adapter)
    rows = torch.randint(64, (40, 8), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row[0] % 2} for row in rows]
    arguments = transformers.TrainingArguments(
        output, max_steps=10, per_device_train_batch_size=8, save_strategy="no", logging_steps=5, use_cpu=True,
        report_to=[], disable_tqdm=True,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=data, callbacks=[*callbacks])


def callback() -> VarstoreCallback:
    manager = vs.CheckpointManager(
        "out", prefix="checkpoint-", save_when=vs.EverySteps(2), keep=vs.Latest(2), background=True
    )
    return VarstoreCallback(manager)


if __name__ == "__main__":
    straight = make_trainer("straight")
    straight.train()

    try:
        make_trainer("out", callback(), Stop()).train()
    except KeyboardInterrupt:
        print("stopped at step 5")
    trainer = make_trainer("out", keeper := callback())
    trainer.train(resume_from_checkpoint=True)
    print("steps:", [saved.step for saved in keeper.manager.all()])
    weights = trainer.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in straight.model.state_dict().items())
    print("resumed as if never stopped")

    vs.convert(
        "out/checkpoint-10",
        "adapter",
        format="huggingface",
        config=trainer.model.peft_config["default"],
        include="adapters/default/*",
        rename={"adapters/default/": ""},
    )
    exported = peft.PeftModel.from_pretrained(base(), "adapter").eval()
    ids = torch.arange(8)[None]
    assert torch.equal(exported(ids).logits, trainer.model.eval()(ids).logits)
    print("from_pretrained loads the adapter")
