-- PostgreSQL creates the database `mlflow` itself (POSTGRES_DB).
CREATE DATABASE prefect;
