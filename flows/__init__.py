import tasks as tasks  # says what to do where this Python lacks the packages
