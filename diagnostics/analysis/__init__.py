"""Statistics of token tables: tables in, tables with intervals out, without torch or a model.

import diagnostics as dx
tables = dx.study(dx.read_tokens("tokens.parquet"))
tables["verdicts"]
"""
