"""LoRA adapters by DPO and GRPO."""
