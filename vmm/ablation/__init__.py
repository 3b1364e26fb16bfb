"""What makes a study fair and readable: match.py equal compute; compare.py paired tests; tables.py and pareto.py."""
