import tasks as tasks  # exits with a remedy if this Python lacks the packages
