CREATE TABLE public.attested_node_entries (
    id integer NOT NULL,
    created_at timestamp with time zone,
    updated_at timestamp with time zone,
    spiffe_id text,
    data_type text,
    serial_number text,
    expires_at timestamp with time zone,
    new_serial_number text,
    new_expires_at timestamp with time zone,
    can_reattest boolean
);
CREATE TABLE public.attested_node_entries_events (
    id integer NOT NULL,
    created_at timestamp with time zone,
    updated_at timestamp with time zone,
    spiffe_id text
);
CREATE SEQUENCE public.attested_node_entries_events_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.attested_node_entries_events_id_seq OWNED BY public.attested_node_entries_events.id;
CREATE SEQUENCE public.attested_node_entries_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.attested_node_entries_id_seq OWNED BY public.attested_node_entries.id;
CREATE TABLE public.bundles (
    id integer NOT NULL,
    created_at timestamp with time zone,
    updated_at timestamp with time zone,
    trust_domain text NOT NULL,
    data bytea
);
CREATE SEQUENCE public.bundles_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.bundles_id_seq OWNED BY public.bundles.id;
CREATE TABLE public.ca_journals (
    id integer NOT NULL,
    created_at timestamp with time zone,
    updated_at timestamp with time zone,
    data bytea,
    active_x509_authority_id text,
    active_jwt_authority_id text
);
CREATE SEQUENCE public.ca_journals_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.ca_journals_id_seq OWNED BY public.ca_journals.id;
CREATE TABLE public.dns_names (
    id integer NOT NULL,
    created_at timestamp with time zone,
    updated_at timestamp with time zone,
    registered_entry_id integer,
    value text
);
CREATE SEQUENCE public.dns_names_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.dns_names_id_seq OWNED BY public.dns_names.id;
CREATE TABLE public.federated_registration_entries (
    bundle_id integer NOT NULL,
    registered_entry_id integer NOT NULL
);
CREATE TABLE public.federated_trust_domains (
    id integer NOT NULL,
    created_at timestamp with time zone,
    updated_at timestamp with time zone,
    trust_domain text NOT NULL,
    bundle_endpoint_url text,
    bundle_endpoint_profile text,
    endpoint_spiffe_id text,
    implicit boolean
);
CREATE SEQUENCE public.federated_trust_domains_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.federated_trust_domains_id_seq OWNED BY public.federated_trust_domains.id;
CREATE TABLE public.join_tokens (
    id integer NOT NULL,
    created_at timestamp with time zone,
    updated_at timestamp with time zone,
    token text,
    expiry bigint
);
CREATE SEQUENCE public.join_tokens_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.join_tokens_id_seq OWNED BY public.join_tokens.id;
CREATE TABLE public.migrations (
    id integer NOT NULL,
    created_at timestamp with time zone,
    updated_at timestamp with time zone,
    version integer,
    code_version text
);
CREATE SEQUENCE public.migrations_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.migrations_id_seq OWNED BY public.migrations.id;
CREATE TABLE public.node_resolver_map_entries (
    id integer NOT NULL,
    created_at timestamp with time zone,
    updated_at timestamp with time zone,
    spiffe_id text,
    type text,
    value text
);
CREATE SEQUENCE public.node_resolver_map_entries_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.node_resolver_map_entries_id_seq OWNED BY public.node_resolver_map_entries.id;
CREATE TABLE public.registered_entries (
    id integer NOT NULL,
    created_at timestamp with time zone,
    updated_at timestamp with time zone,
    entry_id text,
    spiffe_id text,
    parent_id text,
    ttl integer,
    admin boolean,
    downstream boolean,
    expiry bigint,
    revision_number bigint,
    store_svid boolean,
    hint text,
    jwt_svid_ttl integer
);
CREATE TABLE public.registered_entries_events (
    id integer NOT NULL,
    created_at timestamp with time zone,
    updated_at timestamp with time zone,
    entry_id text
);
CREATE SEQUENCE public.registered_entries_events_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.registered_entries_events_id_seq OWNED BY public.registered_entries_events.id;
CREATE SEQUENCE public.registered_entries_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.registered_entries_id_seq OWNED BY public.registered_entries.id;
CREATE TABLE public.selectors (
    id integer NOT NULL,
    created_at timestamp with time zone,
    updated_at timestamp with time zone,
    registered_entry_id integer,
    type text,
    value text
);
CREATE SEQUENCE public.selectors_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.selectors_id_seq OWNED BY public.selectors.id;
ALTER TABLE ONLY public.attested_node_entries ALTER COLUMN id SET DEFAULT nextval('public.attested_node_entries_id_seq'::regclass);
ALTER TABLE ONLY public.attested_node_entries_events ALTER COLUMN id SET DEFAULT nextval('public.attested_node_entries_events_id_seq'::regclass);
ALTER TABLE ONLY public.bundles ALTER COLUMN id SET DEFAULT nextval('public.bundles_id_seq'::regclass);
ALTER TABLE ONLY public.ca_journals ALTER COLUMN id SET DEFAULT nextval('public.ca_journals_id_seq'::regclass);
ALTER TABLE ONLY public.dns_names ALTER COLUMN id SET DEFAULT nextval('public.dns_names_id_seq'::regclass);
ALTER TABLE ONLY public.federated_trust_domains ALTER COLUMN id SET DEFAULT nextval('public.federated_trust_domains_id_seq'::regclass);
ALTER TABLE ONLY public.join_tokens ALTER COLUMN id SET DEFAULT nextval('public.join_tokens_id_seq'::regclass);
ALTER TABLE ONLY public.migrations ALTER COLUMN id SET DEFAULT nextval('public.migrations_id_seq'::regclass);
ALTER TABLE ONLY public.node_resolver_map_entries ALTER COLUMN id SET DEFAULT nextval('public.node_resolver_map_entries_id_seq'::regclass);
ALTER TABLE ONLY public.registered_entries ALTER COLUMN id SET DEFAULT nextval('public.registered_entries_id_seq'::regclass);
ALTER TABLE ONLY public.registered_entries_events ALTER COLUMN id SET DEFAULT nextval('public.registered_entries_events_id_seq'::regclass);
ALTER TABLE ONLY public.selectors ALTER COLUMN id SET DEFAULT nextval('public.selectors_id_seq'::regclass);
INSERT INTO public.attested_node_entries VALUES (1, '2026-11-23 04:40:54.466641+00', '2026-11-23 04:40:54.466641+00', 'spiffe://example.org/spire/agent/join_token/a', 'join_token', '1234567890123456789012345678901234567890', '2286-11-20 17:46:39+00', '', NULL, false);
INSERT INTO public.attested_node_entries VALUES (2, '2026-11-23 04:40:54.477462+00', '2026-11-23 04:40:54.477462+00', 'spiffe://example.org/spire/agent/x509pop/b', 'x509pop', '1', '2286-11-20 17:46:39+00', '2', '2286-11-20 17:46:40+00', true);
INSERT INTO public.attested_node_entries VALUES (3, '2026-11-23 04:40:54.482552+00', '2026-11-23 04:40:54.482552+00', 'spiffe://example.org/spire/agent/banned', 'k8s_psat', '', '1970-01-01 00:00:00+00', '', NULL, true);
INSERT INTO public.attested_node_entries VALUES (4, '2026-11-23 04:40:54.486578+00', '2026-11-23 04:40:54.486578+00', 'spiffe://example.org/spire/agent/past', 'join_token', '3', '1970-01-01 00:00:01+00', '', NULL, false);
INSERT INTO public.attested_node_entries VALUES (5, '2026-11-23 04:40:54.497724+00', '2026-11-23 04:40:54.497724+00', 'spiffe://example.org/spire/agent/old', 'join_token', '4', '2286-11-20 17:46:39+00', NULL, NULL, NULL);
INSERT INTO public.attested_node_entries_events VALUES (1, '2026-11-23 04:40:54.467368+00', '2026-11-23 04:40:54.467368+00', 'spiffe://example.org/spire/agent/join_token/a');
INSERT INTO public.attested_node_entries_events VALUES (2, '2026-11-23 04:40:54.475586+00', '2026-11-23 04:40:54.475586+00', 'spiffe://example.org/spire/agent/join_token/a');
INSERT INTO public.attested_node_entries_events VALUES (3, '2026-11-23 04:40:54.477794+00', '2026-11-23 04:40:54.477794+00', 'spiffe://example.org/spire/agent/x509pop/b');
INSERT INTO public.attested_node_entries_events VALUES (4, '2026-11-23 04:40:54.479129+00', '2026-11-23 04:40:54.479129+00', 'spiffe://example.org/spire/agent/x509pop/b');
INSERT INTO public.attested_node_entries_events VALUES (5, '2026-11-23 04:40:54.48283+00', '2026-11-23 04:40:54.48283+00', 'spiffe://example.org/spire/agent/banned');
INSERT INTO public.attested_node_entries_events VALUES (6, '2026-11-23 04:40:54.4849+00', '2026-11-23 04:40:54.4849+00', 'spiffe://example.org/spire/agent/banned');
INSERT INTO public.attested_node_entries_events VALUES (7, '2026-11-23 04:40:54.48686+00', '2026-11-23 04:40:54.48686+00', 'spiffe://example.org/spire/agent/past');
INSERT INTO public.attested_node_entries_events VALUES (8, '2026-11-23 04:40:54.493123+00', '2026-11-23 04:40:54.493123+00', 'spiffe://example.org/spire/agent/past');
INSERT INTO public.attested_node_entries_events VALUES (9, '2026-11-23 04:40:54.498023+00', '2026-11-23 04:40:54.498023+00', 'spiffe://example.org/spire/agent/old');
INSERT INTO public.attested_node_entries_events VALUES (10, '2026-11-23 04:40:54.504392+00', '2026-11-23 04:40:54.504392+00', 'spiffe://example.org/spire/agent/old');
INSERT INTO public.attested_node_entries_events VALUES (11, '2026-11-23 04:40:54.506742+00', '2026-11-23 04:40:54.506742+00', 'spiffe://example.org/spire/agent/gone');
INSERT INTO public.attested_node_entries_events VALUES (12, '2026-11-23 04:40:54.507848+00', '2026-11-23 04:40:54.507848+00', 'spiffe://example.org/spire/agent/gone');
INSERT INTO public.attested_node_entries_events VALUES (13, '2026-11-23 04:40:54.51026+00', '2026-11-23 04:40:54.51026+00', 'spiffe://example.org/spire/agent/gone');
INSERT INTO public.bundles VALUES (2, '2026-11-23 04:40:54.35495+00', '2026-11-23 04:40:54.35495+00', 'spiffe://web.test', '\x0a117370696666653a2f2f7765622e7465737412e5020ae2023082015e30820105a003020102020103300a06082a8648ce3d040302300e310c300a060355040a13037765623020170d3233313131343232313332305a180f32323836313132303137343633395a300e310c300a060355040a13037765623059301306072a8648ce3d020106082a8648ce3d03010703420004ed718144539cdf9c8e774ea67267ba1782d3a1e630a4f788634d4c6fa1dbc5bc0bde0a6adfdec522f318f6d79950492a8e3518cbfd17d9f9e542e8b104d18d90a3523050300e0603551d0f0101ff040403020204300f0603551d130101ff040530030101ff300c0603551d0e04050403776562301f0603551d110418301686147370696666653a2f2f6578616d706c652e6f7267300a06082a8648ce3d0403020347003044022062d0d8268bf83952aff34adc1c246049a67b33d09f9a6f158c3a94d4fe23d79a022047a192a57f0a30dc8679bb1523babcaecb3ebde8bf89e0a8e914ae8e5fc784f6');
INSERT INTO public.bundles VALUES (3, '2026-11-23 04:40:54.362498+00', '2026-11-23 04:40:54.362498+00', 'spiffe://spiffe.test', '\x0a147370696666653a2f2f7370696666652e746573741a660a5b3059301306072a8648ce3d020106082a8648ce3d030107034200041bdccaa5c0698b7ab240e7f367776052772a50ccd552863d2ed4ca3930419f6b719beb16127e81afff59ad3e2d25afb387201bfa17e39fd44f0c1030050aecab12016b18ffc7afa0252080808080802028808080808080808040');
INSERT INTO public.bundles VALUES (4, '2026-11-23 04:40:54.366483+00', '2026-11-23 04:40:54.366483+00', 'spiffe://empty.test', '\x0a137370696666653a2f2f656d7074792e74657374');
INSERT INTO public.bundles VALUES (1, '2026-11-23 04:40:54.351669+00', '2026-11-23 04:40:54.37101+00', 'spiffe://example.org', '\x0a147370696666653a2f2f6578616d706c652e6f726712ec020ae902308201653082010ba003020102020105300a06082a8648ce3d0403023010310e300c060355040a130566697273743020170d3233313131343232313332305a180f32323836313132303137343633395a3010310e300c060355040a130566697273743059301306072a8648ce3d020106082a8648ce3d030107034200044fe85332a323e9a2aa21b23ca9e6fc894eeae7a71b0932b357b97ae2ddb957a82719195319fabf64173418102e9162a60e00f36e79757816c04336adc6491264a3543052300e0603551d0f0101ff040403020204300f0603551d130101ff040530030101ff300e0603551d0e040704056669727374301f0603551d110418301686147370696666653a2f2f6578616d706c652e6f7267300a06082a8648ce3d04030203480030450220264a98090ebefbca6b775840650b435f8a58f5135af25b1e69f0ee53cbd19a6a022100cba48c7b623622042f3faf29947701106f3bdcdc78e9e16a2542dc0c7fa7e2ba12f1020aec02308201683082010ea003020102020106300a06082a8648ce3d0403023011310f300d060355040a13067365636f6e643020170d3233313131343232313332305a180f32323836313132303137343633395a3011310f300d060355040a13067365636f6e643059301306072a8648ce3d020106082a8648ce3d0301070342000489eda750f6cdc6173af27b3449ef902a278b5e96eb8552398a0841e6d3ce17edf0bb963e033b6d3c8a2540d6e3c33f94d742cff62879941d007f377b58d9da16a3553053300e0603551d0f0101ff040403020204300f0603551d130101ff040530030101ff300f0603551d0e040804067365636f6e64301f0603551d110418301686147370696666653a2f2f6578616d706c652e6f7267300a06082a8648ce3d040302034800304502202926b53f0b52eab1f97eae0725b889de46302e5e4c2699656d17fc72a9eb4e62022100ddd3dc8b9e898f542030d1b0690476495d2bb16ec173ad19d4e6e97f85c8729210011a6a0a5b3059301306072a8648ce3d020106082a8648ce3d030107034200047ec8adc766d61da7344270f9c3167659f6d8ebef17a4dd3001a77e8df6c07b143ad9b0f1b6c515d3c48b33c110929907fdeb379775a3f4a76054bc7e4c0a22d01205666972737418ffc7afa0251a6d0a5b3059301306072a8648ce3d020106082a8648ce3d0301070342000475e3d84c55514df2388ff600569f79ecacefa6c53ba00da9390419df53d6c8ba4b2b7330238ddf7e19cfc3fa7af0ca2e612a4d74879413618ba4aeb5d0e0823f12067365636f6e6418ffc7afa02520011a6a0a5b3059301306072a8648ce3d020106082a8648ce3d0301070342000478e49812568ec13fc65b02396d63059e11558b184451e7739416d6a163b1f5a1e43ea9aea26ce388d6c042e722a3a8615d74811744b4ee2f81bb7aeca004f36c1205746869726418ffc7afa02520d804282a');
INSERT INTO public.ca_journals VALUES (1, '2026-11-23 04:40:54.534907+00', '2026-11-23 04:40:54.534907+00', '\x0aa7030a01411080e2cfaa061ae902308201653082010ba003020102020105300a06082a8648ce3d0403023010310e300c060355040a130566697273743020170d3233313131343232313332305a180f32323836313132303137343633395a3010310e300c060355040a130566697273743059301306072a8648ce3d020106082a8648ce3d03010703420004e3275b348599403805438f478750c397b51d9c3ad2caf21a3e0babb52213a44df485daf0c6cd141755a6ef24b608cd3e5c553fe673f3f1845ff1d46aba818815a3543052300e0603551d0f0101ff040403020204300f0603551d130101ff040530030101ff300e0603551d0e040704056669727374301f0603551d110418301686147370696666653a2f2f6578616d706c652e6f7267300a06082a8648ce3d0403020348003045022100e15d3f92720dfdc9438426761f8d7dde942808da6ff584fbc0ad5e7b02e0965b02203f05c33b7ee6f2a38afb275d7f56616c6ce455bd6bcafcb12817bd90880b7786280332283030303030303030303030303030303030303030303030303030303030303030303030303030303038ffc7afa025', '0000000000000000000000000000000000000000', '');
INSERT INTO public.ca_journals VALUES (2, '2026-11-23 04:40:54.538472+00', '2026-11-23 04:40:54.538472+00', '\x0aa7030a01411080e2cfaa061ae902308201653082010ba003020102020105300a06082a8648ce3d0403023010310e300c060355040a130566697273743020170d3233313131343232313332305a180f32323836313132303137343633395a3010310e300c060355040a130566697273743059301306072a8648ce3d020106082a8648ce3d03010703420004d2abe9bbb38501093879c33202c120e1f74374f183f339152236ba8c12b0d38914a7d070a21f67d097de5bd91c37b7824f9fee759afdb30508db1119c317c779a3543052300e0603551d0f0101ff040403020204300f0603551d130101ff040530030101ff300e0603551d0e040704056669727374301f0603551d110418301686147370696666653a2f2f6578616d706c652e6f7267300a06082a8648ce3d04030203480030450220569fe5d5c304701760bb0577a96d6e7551634b1f1d5ce8ea87029db251d8e0aa02210097f2d0ae28f3616ca5a32c68506aaa96855bb5805ddcc44b9fc8e5cbcf019044280332283030303030303030303030303030303030303030303030303030303030303030303030303030303138ffc7afa025', '0000000000000000000000000000000000000001', '');
INSERT INTO public.ca_journals VALUES (3, '2026-11-23 04:40:54.5393+00', '2026-11-23 04:40:54.5393+00', '\x0aa6030a01411080e2cfaa061ae802308201643082010ba003020102020105300a06082a8648ce3d0403023010310e300c060355040a130566697273743020170d3233313131343232313332305a180f32323836313132303137343633395a3010310e300c060355040a130566697273743059301306072a8648ce3d020106082a8648ce3d03010703420004e7a804be3b7a0554a37fe2fd760943c251e6bc8e5e64c560bb5bed51a7bcc35b9eab0cc615e1f4e3a57389a554c6e0f74b830322408940fc6ee6d86e479fa3a3a3543052300e0603551d0f0101ff040403020204300f0603551d130101ff040530030101ff300e0603551d0e040704056669727374301f0603551d110418301686147370696666653a2f2f6578616d706c652e6f7267300a06082a8648ce3d0403020347003044022028b734f267458744231760f5c54f3c3384a6bbce0dbcf1e67b36ba66c7ca7d0902206612d33a5c6edfa6bd3357f7bb64e83c7dcaa3c8d4caf725e9f98719da3a859f280332283030303030303030303030303030303030303030303030303030303030303030303030303030303238ffc7afa025', '0000000000000000000000000000000000000002', '');
INSERT INTO public.dns_names VALUES (10, '2026-11-23 04:40:54.456525+00', '2026-11-23 04:40:54.456525+00', 2, 'z.example');
INSERT INTO public.dns_names VALUES (11, '2026-11-23 04:40:54.457052+00', '2026-11-23 04:40:54.457052+00', 2, 'a.example');
INSERT INTO public.dns_names VALUES (12, '2026-11-23 04:40:54.457244+00', '2026-11-23 04:40:54.457244+00', 2, 'xn--bcher-kva.example');
INSERT INTO public.federated_registration_entries VALUES (2, 2);
INSERT INTO public.federated_registration_entries VALUES (3, 2);
INSERT INTO public.federated_registration_entries VALUES (4, 2);
INSERT INTO public.federated_trust_domains VALUES (1, '2026-11-23 04:40:54.522553+00', '2026-11-23 04:40:54.522553+00', 'web.test', 'https://127.0.0.1:1/web.test?a=b%20c', 'https_web', '', false);
INSERT INTO public.federated_trust_domains VALUES (2, '2026-11-23 04:40:54.526479+00', '2026-11-23 04:40:54.526479+00', 'spiffe.test', 'https://127.0.0.1:1/spiffe.test?a=b%20c', 'https_spiffe', 'spiffe://spiffe.test/endpoint', false);
INSERT INTO public.join_tokens VALUES (1, '2026-11-23 04:40:54.514924+00', '2026-11-23 04:40:54.514924+00', 'unused', 9999999999);
INSERT INTO public.join_tokens VALUES (2, '2026-11-23 04:40:54.515714+00', '2026-11-23 04:40:54.515714+00', 'past', 1);
INSERT INTO public.migrations VALUES (1, '2026-11-23 04:40:54.342895+00', '2026-11-23 04:40:54.342895+00', 23, '1.13.6');
INSERT INTO public.node_resolver_map_entries VALUES (1, '2026-11-23 04:40:54.474976+00', '2026-11-23 04:40:54.474976+00', 'spiffe://example.org/spire/agent/join_token/a', 'x509pop', 'subject:cn:a');
INSERT INTO public.node_resolver_map_entries VALUES (2, '2026-11-23 04:40:54.475352+00', '2026-11-23 04:40:54.475352+00', 'spiffe://example.org/spire/agent/join_token/a', 'docker', 'label:ünïcode ☃');
INSERT INTO public.node_resolver_map_entries VALUES (3, '2026-11-23 04:40:54.478698+00', '2026-11-23 04:40:54.478698+00', 'spiffe://example.org/spire/agent/x509pop/b', 'x509pop', 'subject:cn:a');
INSERT INTO public.node_resolver_map_entries VALUES (4, '2026-11-23 04:40:54.47894+00', '2026-11-23 04:40:54.47894+00', 'spiffe://example.org/spire/agent/x509pop/b', 'docker', 'label:ünïcode ☃');
INSERT INTO public.node_resolver_map_entries VALUES (5, '2026-11-23 04:40:54.484484+00', '2026-11-23 04:40:54.484484+00', 'spiffe://example.org/spire/agent/banned', 'x509pop', 'subject:cn:a');
INSERT INTO public.node_resolver_map_entries VALUES (6, '2026-11-23 04:40:54.484717+00', '2026-11-23 04:40:54.484717+00', 'spiffe://example.org/spire/agent/banned', 'docker', 'label:ünïcode ☃');
INSERT INTO public.node_resolver_map_entries VALUES (7, '2026-11-23 04:40:54.492691+00', '2026-11-23 04:40:54.492691+00', 'spiffe://example.org/spire/agent/past', 'x509pop', 'subject:cn:a');
INSERT INTO public.node_resolver_map_entries VALUES (8, '2026-11-23 04:40:54.492921+00', '2026-11-23 04:40:54.492921+00', 'spiffe://example.org/spire/agent/past', 'docker', 'label:ünïcode ☃');
INSERT INTO public.node_resolver_map_entries VALUES (9, '2026-11-23 04:40:54.504011+00', '2026-11-23 04:40:54.504011+00', 'spiffe://example.org/spire/agent/old', 'x509pop', 'subject:cn:a');
INSERT INTO public.node_resolver_map_entries VALUES (10, '2026-11-23 04:40:54.504251+00', '2026-11-23 04:40:54.504251+00', 'spiffe://example.org/spire/agent/old', 'docker', 'label:ünïcode ☃');
INSERT INTO public.registered_entries VALUES (1, '2026-11-23 04:40:54.3772+00', '2026-11-23 04:40:54.3772+00', 'least', 'spiffe://example.org/least', 'spiffe://example.org/node', 0, false, false, 0, 0, false, '', 0);
INSERT INTO public.registered_entries VALUES (3, '2026-11-23 04:40:54.404379+00', '2026-11-23 04:40:54.404379+00', 'stored', 'spiffe://example.org/stored', 'spiffe://example.org/node', 0, false, false, 0, 0, true, '', 0);
INSERT INTO public.registered_entries VALUES (4, '2026-11-23 04:40:54.415348+00', '2026-11-23 04:40:54.415348+00', 'eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee', 'spiffe://example.org/llllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllll', 'spiffe://example.org/node', 0, false, false, 0, 0, false, '', 0);
INSERT INTO public.registered_entries VALUES (5, '2026-11-23 04:40:54.421269+00', '2026-11-23 04:40:54.421269+00', 'alias', 'spiffe://example.org/node', 'spiffe://example.org/spire/server', 0, false, false, 0, 0, false, '', 0);
INSERT INTO public.registered_entries VALUES (2, '2026-11-23 04:40:54.38764+00', '2026-11-23 04:40:54.455375+00', 'full', 'spiffe://example.org/full', 'spiffe://example.org/spire/agent/join_token/a', 2147483647, true, true, 9999999999, 3, false, 'hint: ☃ ''quoted''', 2147483647);
INSERT INTO public.registered_entries VALUES (7, '2026-11-23 04:40:54.429499+00', '2026-11-23 04:40:54.429499+00', 'old', 'spiffe://example.org/old', 'spiffe://example.org/node', 0, false, false, 0, NULL, NULL, NULL, NULL);
INSERT INTO public.registered_entries_events VALUES (1, '2026-11-23 04:40:54.384168+00', '2026-11-23 04:40:54.384168+00', 'least');
INSERT INTO public.registered_entries_events VALUES (2, '2026-11-23 04:40:54.397887+00', '2026-11-23 04:40:54.397887+00', 'full');
INSERT INTO public.registered_entries_events VALUES (3, '2026-11-23 04:40:54.40555+00', '2026-11-23 04:40:54.40555+00', 'stored');
INSERT INTO public.registered_entries_events VALUES (4, '2026-11-23 04:40:54.417158+00', '2026-11-23 04:40:54.417158+00', 'eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee');
INSERT INTO public.registered_entries_events VALUES (5, '2026-11-23 04:40:54.423039+00', '2026-11-23 04:40:54.423039+00', 'alias');
INSERT INTO public.registered_entries_events VALUES (6, '2026-11-23 04:40:54.427568+00', '2026-11-23 04:40:54.427568+00', 'deleted');
INSERT INTO public.registered_entries_events VALUES (7, '2026-11-23 04:40:54.43102+00', '2026-11-23 04:40:54.43102+00', 'old');
INSERT INTO public.registered_entries_events VALUES (8, '2026-11-23 04:40:54.433485+00', '2026-11-23 04:40:54.433485+00', 'deleted');
INSERT INTO public.registered_entries_events VALUES (9, '2026-11-23 04:40:54.440562+00', '2026-11-23 04:40:54.440562+00', 'full');
INSERT INTO public.registered_entries_events VALUES (10, '2026-11-23 04:40:54.44806+00', '2026-11-23 04:40:54.44806+00', 'full');
INSERT INTO public.registered_entries_events VALUES (11, '2026-11-23 04:40:54.459632+00', '2026-11-23 04:40:54.459632+00', 'full');
INSERT INTO public.selectors VALUES (1, '2026-11-23 04:40:54.382529+00', '2026-11-23 04:40:54.382529+00', 1, 'unix', 'uid:0');
INSERT INTO public.selectors VALUES (6, '2026-11-23 04:40:54.404786+00', '2026-11-23 04:40:54.404786+00', 3, 'aws_secretsmanager', 'secretname:s');
INSERT INTO public.selectors VALUES (7, '2026-11-23 04:40:54.416356+00', '2026-11-23 04:40:54.416356+00', 4, 'unix', 'path:/ppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppp');
INSERT INTO public.selectors VALUES (8, '2026-11-23 04:40:54.421707+00', '2026-11-23 04:40:54.421707+00', 5, 'x509pop', 'subject:cn:a');
INSERT INTO public.selectors VALUES (10, '2026-11-23 04:40:54.429957+00', '2026-11-23 04:40:54.429957+00', 7, 'unix', 'uid:1');
INSERT INTO public.selectors VALUES (19, '2026-11-23 04:40:54.455646+00', '2026-11-23 04:40:54.455646+00', 2, 'unix', 'uid:2147483648');
INSERT INTO public.selectors VALUES (20, '2026-11-23 04:40:54.455864+00', '2026-11-23 04:40:54.455864+00', 2, 'k8s', 'pod-label:a/b:c:d');
INSERT INTO public.selectors VALUES (21, '2026-11-23 04:40:54.456141+00', '2026-11-23 04:40:54.456141+00', 2, 'docker', 'env:A="q" ''p'' \ % _ ; -- 	');
INSERT INTO public.selectors VALUES (22, '2026-11-23 04:40:54.456326+00', '2026-11-23 04:40:54.456326+00', 2, 'docker', 'label:ünïcode ☃');
SELECT pg_catalog.setval('public.attested_node_entries_events_id_seq', 13, true);
SELECT pg_catalog.setval('public.attested_node_entries_id_seq', 6, true);
SELECT pg_catalog.setval('public.bundles_id_seq', 4, true);
SELECT pg_catalog.setval('public.ca_journals_id_seq', 3, true);
SELECT pg_catalog.setval('public.dns_names_id_seq', 12, true);
SELECT pg_catalog.setval('public.federated_trust_domains_id_seq', 2, true);
SELECT pg_catalog.setval('public.join_tokens_id_seq', 2, true);
SELECT pg_catalog.setval('public.migrations_id_seq', 1, true);
SELECT pg_catalog.setval('public.node_resolver_map_entries_id_seq', 12, true);
SELECT pg_catalog.setval('public.registered_entries_events_id_seq', 11, true);
SELECT pg_catalog.setval('public.registered_entries_id_seq', 7, true);
SELECT pg_catalog.setval('public.selectors_id_seq', 22, true);
ALTER TABLE ONLY public.attested_node_entries_events
    ADD CONSTRAINT attested_node_entries_events_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.attested_node_entries
    ADD CONSTRAINT attested_node_entries_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.bundles
    ADD CONSTRAINT bundles_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.ca_journals
    ADD CONSTRAINT ca_journals_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.dns_names
    ADD CONSTRAINT dns_names_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.federated_registration_entries
    ADD CONSTRAINT federated_registration_entries_pkey PRIMARY KEY (bundle_id, registered_entry_id);
ALTER TABLE ONLY public.federated_trust_domains
    ADD CONSTRAINT federated_trust_domains_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.join_tokens
    ADD CONSTRAINT join_tokens_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.migrations
    ADD CONSTRAINT migrations_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.node_resolver_map_entries
    ADD CONSTRAINT node_resolver_map_entries_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.registered_entries_events
    ADD CONSTRAINT registered_entries_events_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.registered_entries
    ADD CONSTRAINT registered_entries_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.selectors
    ADD CONSTRAINT selectors_pkey PRIMARY KEY (id);
CREATE INDEX idx_attested_node_entries_expires_at ON public.attested_node_entries USING btree (expires_at);
CREATE INDEX idx_ca_journals_active_jwt_authority_id ON public.ca_journals USING btree (active_jwt_authority_id);
CREATE INDEX idx_ca_journals_active_x509_authority_id ON public.ca_journals USING btree (active_x509_authority_id);
CREATE UNIQUE INDEX idx_dns_entry ON public.dns_names USING btree (registered_entry_id, value);
CREATE INDEX idx_federated_registration_entries_registered_entry_id ON public.federated_registration_entries USING btree (registered_entry_id);
CREATE UNIQUE INDEX idx_node_resolver_map ON public.node_resolver_map_entries USING btree (spiffe_id, type, value);
CREATE INDEX idx_registered_entries_expiry ON public.registered_entries USING btree (expiry);
CREATE INDEX idx_registered_entries_hint ON public.registered_entries USING btree (hint);
CREATE INDEX idx_registered_entries_parent_id ON public.registered_entries USING btree (parent_id);
CREATE INDEX idx_registered_entries_spiffe_id ON public.registered_entries USING btree (spiffe_id);
CREATE UNIQUE INDEX idx_selector_entry ON public.selectors USING btree (registered_entry_id, type, value);
CREATE INDEX idx_selectors_type_value ON public.selectors USING btree (type, value);
CREATE UNIQUE INDEX uix_attested_node_entries_spiffe_id ON public.attested_node_entries USING btree (spiffe_id);
CREATE UNIQUE INDEX uix_bundles_trust_domain ON public.bundles USING btree (trust_domain);
CREATE UNIQUE INDEX uix_federated_trust_domains_trust_domain ON public.federated_trust_domains USING btree (trust_domain);
CREATE UNIQUE INDEX uix_join_tokens_token ON public.join_tokens USING btree (token);
CREATE UNIQUE INDEX uix_registered_entries_entry_id ON public.registered_entries USING btree (entry_id);
