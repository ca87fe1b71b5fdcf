"""All the SQL: the tables, their statements, and the transactions that they run in."""
