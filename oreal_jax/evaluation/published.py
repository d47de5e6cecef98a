"""The paper's results (arXiv:2502.06781), to compare with ours.

Greedy pass@1 in percent, zero-shot, measured with OpenCompass; by preset name.
"""

SETS = ("math500", "aime2024", "aime2025-i", "livemathbench", "olympiadbench")

PASS_AT_1: dict[str, tuple[float, float, float, float, float]] = {
    "OREAL-7B-SFT (start)": (86.4, 26.7, 26.7, 54.2, 56.0),
    "OREAL-7B": (91.0, 33.3, 33.3, 62.6, 59.9),
    "DeepSeek-R1-Distill-Qwen-7B (start)": (92.8, 55.5, 40.0, 65.6, 64.1),
    "OREAL-DSR1-Distill-Qwen-7B": (94.0, 50.0, 40.0, 65.6, 66.1),
    "OREAL-32B": (95.0, 60.0, 46.7, 74.8, 72.4),
}
