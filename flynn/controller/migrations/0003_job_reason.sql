-- What a job waits for, or why it was stopped, in the scheduler's words.
ALTER TABLE job_cache ADD COLUMN reason text;
