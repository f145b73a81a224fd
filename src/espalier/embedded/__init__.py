"""The embedded default: a small OLMoE checkpoint, four text domains and the tasks made from them."""
