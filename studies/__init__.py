"""Studies: one folder a question. A study file names its model and data; nothing else imports this package."""
