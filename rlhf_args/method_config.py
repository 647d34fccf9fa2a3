class MethodConfig:
    """The last base of every method's config: defaults for flags that only some methods have.

    Shared code can thus read `config.packing` with every method. Plain attributes, not fields: they add no flag.
    """

    # ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────
    length_flag = "max_length"  # the flag that limits a row's tokens
    max_length: int | None = None
    max_prompt_length: int | None = None
    packing = False

    # ── sampled answers ─────────────────────────────────────────────────────────────────────────────────────────────
    max_completion_length = 0
    steps_per_generation: int | None = None
    lmbda = 0.0
    seq_kd = False

    # ── models beside the policy ─────────────────────────────────────────────────────────────────────────────────────
    precompute_ref_log_probs: bool | None = None
    sync_ref_model = False
    value_model_path: str | None = None
    teacher_model_name_or_path = ""
    teacher_load_in_4bit: bool | None = None

    # ── the rest ─────────────────────────────────────────────────────────────────────────────────────────────────────
    loss_type: str | list[str] = []
    disable_dropout = False
    cast_lm_head_to_fp32 = False
    model_init_kwargs: dict | None = None
    notes: list[str] = []  # lines that a run prints at its start

    def samples_answers(self) -> bool:
        """True if the trained model answers prompts in some steps, and learns from its own answers."""
        return False

    def learns_from_data(self) -> bool:
        """True if some steps train on the answers in the data."""
        return True
