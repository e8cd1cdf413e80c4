"""The command line, one file per noun: parse, call one function below, print."""

import gc

gc.set_threshold(50_000)  # what is imported is no garbage: to look for some takes a tenth of a short command's time
