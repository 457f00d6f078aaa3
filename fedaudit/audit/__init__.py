"""The auditor, the rows it writes, and what it looks at and announces."""
