"""BlackMamba: a mixture of experts and Mamba-1, as a Hugging Face model."""


def register() -> None:
    """Makes BlackMamba known to AutoConfig and AutoModelForCausalLM. Safe to call twice."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from tunescope.models.blackmamba.configuration import BlackMambaConfig
    from tunescope.models.blackmamba.modeling import BlackMambaForCausalLM

    AutoConfig.register(BlackMambaConfig.model_type, BlackMambaConfig, exist_ok=True)
    AutoModelForCausalLM.register(BlackMambaConfig, BlackMambaForCausalLM, exist_ok=True)
