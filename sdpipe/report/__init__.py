"""The paper's figures and tables, drawn again from finished runs."""
