-- The tables of spec/controller section 9. Soft-deleted rows have deleted_at set and are invisible to the API.

CREATE TABLE deployment_strategies (name text PRIMARY KEY);
INSERT INTO deployment_strategies VALUES
    ('all-at-once'), ('one-by-one'), ('one-down-one-up'), ('in-batches'), ('sirenia'), ('discoverd-meta');

CREATE TABLE job_states (name text PRIMARY KEY);
INSERT INTO job_states VALUES
    ('pending'), ('blocked'), ('starting'), ('up'), ('stopping'), ('down'), ('crashed'), ('failed');

CREATE TABLE release_types (name text PRIMARY KEY);
INSERT INTO release_types VALUES ('code'), ('config');

CREATE TABLE scale_request_states (name text PRIMARY KEY);
INSERT INTO scale_request_states VALUES ('pending'), ('cancelled'), ('complete');

CREATE TABLE volume_types (name text PRIMARY KEY);
INSERT INTO volume_types VALUES ('data'), ('squashfs'), ('ext2');

CREATE TABLE volume_states (name text PRIMARY KEY);
INSERT INTO volume_states VALUES ('pending'), ('created'), ('destroyed');

CREATE TABLE sink_kinds (name text PRIMARY KEY);
INSERT INTO sink_kinds VALUES ('syslog');

CREATE TABLE backup_statuses (name text PRIMARY KEY);
INSERT INTO backup_statuses VALUES ('running'), ('complete'), ('error');

CREATE TABLE event_types (name text PRIMARY KEY);
INSERT INTO event_types VALUES
    ('app'), ('app_deletion'), ('app_release'), ('app_garbage_collection'), ('artifact'), ('cluster_backup'),
    ('deployment'), ('domain_migration'), ('job'), ('key'), ('key_deletion'), ('provider'), ('release'),
    ('release_deletion'), ('resource'), ('resource_deletion'), ('resource_app_deletion'), ('route'),
    ('route_deletion'), ('scale'), ('scale_request'), ('scale_request_cancelation'), ('sink'), ('sink_deletion'),
    ('volume');

CREATE SEQUENCE name_ids MAXVALUE 4294967295;

CREATE TABLE apps (
    app_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    name text NOT NULL,
    release_id uuid,
    meta jsonb NOT NULL DEFAULT '{}',
    strategy text NOT NULL DEFAULT 'all-at-once' REFERENCES deployment_strategies,
    deploy_timeout integer NOT NULL DEFAULT 120,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    deleted_at timestamptz
);
CREATE UNIQUE INDEX apps_name_live ON apps (name) WHERE deleted_at IS NULL;

CREATE TABLE artifacts (
    artifact_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    type text NOT NULL,
    uri text NOT NULL,
    meta jsonb,
    manifest jsonb,
    hashes jsonb,
    size bigint,
    layer_url_template text,
    created_at timestamptz NOT NULL DEFAULT now(),
    deleted_at timestamptz,
    CONSTRAINT flynn_artifacts_have_manifests CHECK (type <> 'flynn' OR manifest IS NOT NULL)
);
CREATE UNIQUE INDEX artifacts_type_uri_live ON artifacts (type, uri) WHERE deleted_at IS NULL;

CREATE TABLE releases (
    release_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    app_id uuid REFERENCES apps,
    env jsonb,
    processes jsonb,
    meta jsonb,
    created_at timestamptz NOT NULL DEFAULT now(),
    deleted_at timestamptz,
    CHECK (app_id IS NOT NULL OR deleted_at IS NOT NULL)
);
CREATE INDEX releases_app ON releases (app_id, created_at DESC);
ALTER TABLE apps ADD FOREIGN KEY (release_id) REFERENCES releases;

CREATE FUNCTION check_release_delete() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.deleted_at IS NOT NULL AND EXISTS (SELECT 1 FROM apps WHERE release_id = NEW.release_id) THEN
        RAISE EXCEPTION 'cannot delete current app release' USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER check_release_delete BEFORE UPDATE OF deleted_at ON releases
    FOR EACH ROW EXECUTE FUNCTION check_release_delete();

CREATE TABLE release_artifacts (
    release_id uuid NOT NULL REFERENCES releases,
    artifact_id uuid NOT NULL REFERENCES artifacts,
    index integer NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    deleted_at timestamptz,
    PRIMARY KEY (release_id, artifact_id)
);
CREATE UNIQUE INDEX release_artifacts_index_live ON release_artifacts (release_id, index) WHERE deleted_at IS NULL;
CREATE INDEX release_artifacts_artifact ON release_artifacts (artifact_id) WHERE deleted_at IS NULL;

CREATE TABLE formations (
    app_id uuid NOT NULL REFERENCES apps,
    release_id uuid NOT NULL REFERENCES releases,
    processes jsonb,
    tags jsonb,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    deleted_at timestamptz,
    PRIMARY KEY (app_id, release_id)
);
CREATE INDEX formations_updated_live ON formations (updated_at) WHERE deleted_at IS NULL;

CREATE TABLE scale_requests (
    scale_request_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    app_id uuid NOT NULL REFERENCES apps,
    release_id uuid NOT NULL REFERENCES releases,
    state text NOT NULL REFERENCES scale_request_states,
    old_processes jsonb,
    new_processes jsonb,
    old_tags jsonb,
    new_tags jsonb,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX scale_requests_pending ON scale_requests (app_id, release_id) WHERE state = 'pending';

CREATE TABLE job_cache (
    job_id uuid PRIMARY KEY,
    cluster_id text NOT NULL DEFAULT '',
    host_id text NOT NULL DEFAULT '',
    app_id uuid NOT NULL REFERENCES apps,
    release_id uuid NOT NULL REFERENCES releases,
    process_type text NOT NULL DEFAULT '',
    state text NOT NULL REFERENCES job_states,
    meta jsonb,
    args jsonb,
    exit_status integer,
    host_error text,
    run_at timestamptz,
    restarts integer,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX job_cache_app ON job_cache (app_id, created_at DESC);
CREATE INDEX job_cache_active ON job_cache (updated_at)
    WHERE state IN ('pending', 'blocked', 'starting', 'up', 'stopping');

CREATE TABLE volumes (
    volume_id uuid PRIMARY KEY,
    host_id text NOT NULL,
    type text NOT NULL REFERENCES volume_types,
    state text NOT NULL REFERENCES volume_states,
    app_id uuid REFERENCES apps,
    release_id uuid REFERENCES releases,
    job_id uuid,
    job_type text NOT NULL DEFAULT '',
    path text NOT NULL DEFAULT '',
    delete_on_stop boolean NOT NULL DEFAULT false,
    meta jsonb,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    decommissioned_at timestamptz
);
CREATE INDEX volumes_updated ON volumes (updated_at);

CREATE TABLE job_volumes (
    job_id uuid NOT NULL REFERENCES job_cache,
    volume_id uuid NOT NULL,  -- no reference: the scheduler may tell of the job before the volume
    index integer NOT NULL,
    PRIMARY KEY (job_id, volume_id)
);

CREATE TABLE deployments (
    deployment_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    app_id uuid NOT NULL REFERENCES apps,
    old_release_id uuid REFERENCES releases,
    new_release_id uuid NOT NULL REFERENCES releases,
    type text NOT NULL REFERENCES release_types,
    strategy text NOT NULL REFERENCES deployment_strategies,
    status text NOT NULL,
    processes jsonb,
    tags jsonb,
    deploy_timeout integer NOT NULL,
    deploy_batch_size integer,
    created_at timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz
);
CREATE UNIQUE INDEX isolate_deploys ON deployments (app_id) WHERE finished_at IS NULL;
CREATE INDEX deployments_app ON deployments (app_id, created_at DESC);

CREATE TABLE providers (
    provider_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    name text NOT NULL,
    url text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    deleted_at timestamptz
);
CREATE UNIQUE INDEX providers_name ON providers (name);
CREATE UNIQUE INDEX providers_url ON providers (url);

CREATE TABLE resources (
    resource_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    provider_id uuid NOT NULL REFERENCES providers,
    external_id text NOT NULL,
    env jsonb,
    created_at timestamptz NOT NULL DEFAULT now(),
    deleted_at timestamptz
);
CREATE UNIQUE INDEX resources_external ON resources (provider_id, external_id);

CREATE TABLE app_resources (
    app_id uuid NOT NULL REFERENCES apps,
    resource_id uuid NOT NULL REFERENCES resources,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (app_id, resource_id)
);
CREATE INDEX app_resources_resource ON app_resources (resource_id);

CREATE TABLE http_routes (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    parent_ref text NOT NULL DEFAULT '',
    service text NOT NULL CHECK (service <> ''),
    domain varchar(255) NOT NULL CHECK (domain <> ''),
    port integer NOT NULL DEFAULT 0 CHECK (port BETWEEN 0 AND 65534),
    path text NOT NULL DEFAULT '/',
    sticky boolean NOT NULL DEFAULT false,
    leader boolean NOT NULL DEFAULT false,
    drain_backends boolean NOT NULL DEFAULT true,
    disable_keep_alives boolean NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    deleted_at timestamptz
);
CREATE UNIQUE INDEX http_routes_address_live ON http_routes (domain, port, path) WHERE deleted_at IS NULL;
CREATE INDEX http_routes_parent_live ON http_routes (parent_ref) WHERE deleted_at IS NULL;

CREATE TABLE tcp_routes (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    parent_ref text NOT NULL DEFAULT '',
    service text NOT NULL CHECK (service <> ''),
    port integer NOT NULL CHECK (port BETWEEN 1 AND 65534),
    leader boolean NOT NULL DEFAULT false,
    drain_backends boolean NOT NULL DEFAULT true,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    deleted_at timestamptz
);
CREATE UNIQUE INDEX tcp_routes_port_live ON tcp_routes (port) WHERE deleted_at IS NULL;

CREATE TABLE certificates (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    cert text NOT NULL,
    key text NOT NULL,
    cert_sha256 bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    deleted_at timestamptz
);
CREATE UNIQUE INDEX certificates_sha256_live ON certificates (cert_sha256) WHERE deleted_at IS NULL;

CREATE TABLE route_certificates (
    http_route_id uuid NOT NULL REFERENCES http_routes ON DELETE CASCADE,
    certificate_id uuid NOT NULL REFERENCES certificates ON DELETE RESTRICT,
    PRIMARY KEY (http_route_id, certificate_id)
);

CREATE TABLE sinks (
    sink_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    kind text NOT NULL REFERENCES sink_kinds,
    config jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    deleted_at timestamptz
);

CREATE TABLE backups (
    backup_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    status text NOT NULL REFERENCES backup_statuses,
    sha512 text,
    size bigint,
    error text,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    completed_at timestamptz,
    deleted_at timestamptz
);

CREATE TABLE domain_migrations (
    migration_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    old_domain text NOT NULL,
    domain text NOT NULL,
    old_tls_cert jsonb,
    tls_cert jsonb,
    created_at timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz
);

CREATE SEQUENCE event_ids;
CREATE TABLE events (
    event_id bigint PRIMARY KEY DEFAULT nextval('event_ids'),
    app_id uuid,  -- no reference: its check would lock the app under the event lock, which must be the last one
    object_type text NOT NULL REFERENCES event_types,
    object_id text NOT NULL,
    unique_id text UNIQUE,  -- of events that are told at most once
    data jsonb,
    op text,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX events_object ON events (object_type, object_id, event_id);
CREATE INDEX events_app ON events (app_id, event_id);

CREATE FUNCTION notify_event() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('events', NEW.event_id::text);
    RETURN NULL;
END
$$;
CREATE TRIGGER notify_event AFTER INSERT ON events FOR EACH ROW EXECUTE FUNCTION notify_event();

CREATE TABLE que_jobs (
    queue text NOT NULL DEFAULT '',
    priority smallint NOT NULL DEFAULT 100,
    run_at timestamptz NOT NULL DEFAULT now(),
    job_id bigserial NOT NULL,
    job_class text NOT NULL,
    args json NOT NULL DEFAULT '{}',
    error_count integer NOT NULL DEFAULT 0,
    last_error text,
    locked_until timestamptz NOT NULL DEFAULT '-infinity',
    locked_by uuid,  -- the attempt that holds the lease; a lost lease shows as another value
    PRIMARY KEY (queue, priority, run_at, job_id)
);
CREATE UNIQUE INDEX que_jobs_id ON que_jobs (job_id);

CREATE FUNCTION notify_que_job() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('que_jobs', NEW.job_class);
    RETURN NULL;
END
$$;
CREATE TRIGGER notify_que_job AFTER INSERT ON que_jobs FOR EACH ROW EXECUTE FUNCTION notify_que_job();
