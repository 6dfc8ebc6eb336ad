"""Tasks with published results for RNN, LSTM and GRU, one per file, and what trains on them."""

from tasks.adding import Adding
from tasks.base import Task
from tasks.copy_memory import CopyMemory
from tasks.digits import Digits, Mnist
from tasks.parity import Parity
from tasks.reber import Reber

__all__ = ["Adding", "CopyMemory", "Digits", "Mnist", "Parity", "Reber", "Task"]
