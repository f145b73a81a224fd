"""The stage `speed`: whole models, and the kernels of one MoE block."""
