-- A build runs before its app has a release.
ALTER TABLE job_cache ALTER COLUMN release_id DROP NOT NULL;

-- Why a deployment failed, for those who did not watch it.
ALTER TABLE deployments ADD COLUMN error text;

-- A job's row goes with the links to its volumes.
ALTER TABLE job_volumes DROP CONSTRAINT job_volumes_job_id_fkey,
    ADD FOREIGN KEY (job_id) REFERENCES job_cache ON DELETE CASCADE;

-- What is over is forgotten after a while (flynn/controller/store/retention.py), and has to be found for that.
CREATE INDEX events_created ON events (created_at);
CREATE INDEX job_cache_ended ON job_cache (app_id, updated_at DESC) WHERE state IN ('down', 'crashed', 'failed');
CREATE INDEX scale_requests_over ON scale_requests (updated_at) WHERE state <> 'pending';
CREATE INDEX deployments_finished ON deployments (app_id, created_at DESC) WHERE finished_at IS NOT NULL;
CREATE INDEX volumes_destroyed ON volumes (updated_at) WHERE state = 'destroyed';
