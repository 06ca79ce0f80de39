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
    can_reattest boolean,
    agent_version text
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
INSERT INTO public.attested_node_entries VALUES (1, '2026-11-23 04:41:06.231184+00', '2026-11-23 04:41:06.231184+00', 'spiffe://example.org/spire/agent/join_token/a', 'join_token', '1234567890123456789012345678901234567890', '2286-11-20 17:46:39+00', '', NULL, false, '');
INSERT INTO public.attested_node_entries VALUES (2, '2026-11-23 04:41:06.239953+00', '2026-11-23 04:41:06.239953+00', 'spiffe://example.org/spire/agent/x509pop/b', 'x509pop', '1', '2286-11-20 17:46:39+00', '2', '2286-11-20 17:46:40+00', true, '');
INSERT INTO public.attested_node_entries VALUES (3, '2026-11-23 04:41:06.247718+00', '2026-11-23 04:41:06.247718+00', 'spiffe://example.org/spire/agent/banned', 'k8s_psat', '', '1970-01-01 00:00:00+00', '', NULL, true, '');
INSERT INTO public.attested_node_entries VALUES (4, '2026-11-23 04:41:06.251744+00', '2026-11-23 04:41:06.251744+00', 'spiffe://example.org/spire/agent/past', 'join_token', '3', '1970-01-01 00:00:01+00', '', NULL, false, '');
INSERT INTO public.attested_node_entries VALUES (5, '2026-11-23 04:41:06.255884+00', '2026-11-23 04:41:06.255884+00', 'spiffe://example.org/spire/agent/old', 'join_token', '4', '2286-11-20 17:46:39+00', NULL, NULL, NULL, '');
INSERT INTO public.attested_node_entries_events VALUES (1, '2026-11-23 04:41:06.231766+00', '2026-11-23 04:41:06.231766+00', 'spiffe://example.org/spire/agent/join_token/a');
INSERT INTO public.attested_node_entries_events VALUES (2, '2026-11-23 04:41:06.233618+00', '2026-11-23 04:41:06.233618+00', 'spiffe://example.org/spire/agent/join_token/a');
INSERT INTO public.attested_node_entries_events VALUES (3, '2026-11-23 04:41:06.240213+00', '2026-11-23 04:41:06.240213+00', 'spiffe://example.org/spire/agent/x509pop/b');
INSERT INTO public.attested_node_entries_events VALUES (4, '2026-11-23 04:41:06.243402+00', '2026-11-23 04:41:06.243402+00', 'spiffe://example.org/spire/agent/x509pop/b');
INSERT INTO public.attested_node_entries_events VALUES (5, '2026-11-23 04:41:06.24798+00', '2026-11-23 04:41:06.24798+00', 'spiffe://example.org/spire/agent/banned');
INSERT INTO public.attested_node_entries_events VALUES (6, '2026-11-23 04:41:06.251162+00', '2026-11-23 04:41:06.251162+00', 'spiffe://example.org/spire/agent/banned');
INSERT INTO public.attested_node_entries_events VALUES (7, '2026-11-23 04:41:06.251992+00', '2026-11-23 04:41:06.251992+00', 'spiffe://example.org/spire/agent/past');
INSERT INTO public.attested_node_entries_events VALUES (8, '2026-11-23 04:41:06.255299+00', '2026-11-23 04:41:06.255299+00', 'spiffe://example.org/spire/agent/past');
INSERT INTO public.attested_node_entries_events VALUES (9, '2026-11-23 04:41:06.256119+00', '2026-11-23 04:41:06.256119+00', 'spiffe://example.org/spire/agent/old');
INSERT INTO public.attested_node_entries_events VALUES (10, '2026-11-23 04:41:06.259704+00', '2026-11-23 04:41:06.259704+00', 'spiffe://example.org/spire/agent/old');
INSERT INTO public.attested_node_entries_events VALUES (11, '2026-11-23 04:41:06.260962+00', '2026-11-23 04:41:06.260962+00', 'spiffe://example.org/spire/agent/gone');
INSERT INTO public.attested_node_entries_events VALUES (12, '2026-11-23 04:41:06.267282+00', '2026-11-23 04:41:06.267282+00', 'spiffe://example.org/spire/agent/gone');
INSERT INTO public.attested_node_entries_events VALUES (13, '2026-11-23 04:41:06.274661+00', '2026-11-23 04:41:06.274661+00', 'spiffe://example.org/spire/agent/gone');
INSERT INTO public.bundles VALUES (2, '2026-11-23 04:41:06.132275+00', '2026-11-23 04:41:06.132275+00', 'spiffe://web.test', '\x0a117370696666653a2f2f7765622e7465737412e7020ae4023082016030820105a003020102020103300a06082a8648ce3d040302300e310c300a060355040a13037765623020170d3233313131343232313332305a180f32323836313132303137343633395a300e310c300a060355040a13037765623059301306072a8648ce3d020106082a8648ce3d03010703420004698e6807d97a7f2fe47d62777b5889e8203fff93e7d4a08e843c276caee77e81e36822edd0b1c15950ea73df2dcc60fd9676919da7b095570dc6cacaac37897ba3523050300e0603551d0f0101ff040403020204300f0603551d130101ff040530030101ff300c0603551d0e04050403776562301f0603551d110418301686147370696666653a2f2f6578616d706c652e6f7267300a06082a8648ce3d0403020349003046022100bdb027d57bb3d71264a4dc87105e00c12ec330918e690aec5728aed99224d9fd022100b8b5675ffa4b7a5123a5c10b82131d8eafcb3c8d9ee8275ee3beafd1825cfd5c');
INSERT INTO public.bundles VALUES (3, '2026-11-23 04:41:06.134566+00', '2026-11-23 04:41:06.134566+00', 'spiffe://spiffe.test', '\x0a147370696666653a2f2f7370696666652e746573741a660a5b3059301306072a8648ce3d020106082a8648ce3d030107034200043d8f65c605377c38e2109c5c65d988f8288c6058350b35084d4b8f5bab2c20a4c475f9792d865732ac9ee5b7b3c2af3560be9aad0a4d7e31523b6db522d8664412016b18ffc7afa0252080808080802028808080808080808040');
INSERT INTO public.bundles VALUES (4, '2026-11-23 04:41:06.138889+00', '2026-11-23 04:41:06.138889+00', 'spiffe://empty.test', '\x0a137370696666653a2f2f656d7074792e74657374');
INSERT INTO public.bundles VALUES (1, '2026-11-23 04:41:06.129455+00', '2026-11-23 04:41:06.14737+00', 'spiffe://example.org', '\x0a147370696666653a2f2f6578616d706c652e6f726712ed020aea02308201663082010ba003020102020105300a06082a8648ce3d0403023010310e300c060355040a130566697273743020170d3233313131343232313332305a180f32323836313132303137343633395a3010310e300c060355040a130566697273743059301306072a8648ce3d020106082a8648ce3d030107034200043a09333fdabd26c79b07e3cbb91c8359fb6a7e393f6fbd3d4fea7b279e27572158b17b35d06bf199b826fa1ed922b0c2e6ab003da5fe8262b33167afc4c5e2c9a3543052300e0603551d0f0101ff040403020204300f0603551d130101ff040530030101ff300e0603551d0e040704056669727374301f0603551d110418301686147370696666653a2f2f6578616d706c652e6f7267300a06082a8648ce3d0403020349003046022100d249da2a5dd3cd900c8c7a074bb026114e8f08013b2c36501bec9f4ec53672e0022100f5610773bab8b78123a6365825a43d3d70782c2bbfb98d5a792d9a793b74ab6012f1020aec02308201683082010ea003020102020106300a06082a8648ce3d0403023011310f300d060355040a13067365636f6e643020170d3233313131343232313332305a180f32323836313132303137343633395a3011310f300d060355040a13067365636f6e643059301306072a8648ce3d020106082a8648ce3d03010703420004596a3b79077b1de4ccc09733e5dac94d6be3223fc5f5b1c288393d1df3addc38dd9d34cebf4b73df6d26d8b87a5eade3bfd8e3788a6e2f611748f9f51e0c9a1fa3553053300e0603551d0f0101ff040403020204300f0603551d130101ff040530030101ff300f0603551d0e040804067365636f6e64301f0603551d110418301686147370696666653a2f2f6578616d706c652e6f7267300a06082a8648ce3d04030203480030450220175a8a5497e80399e0cce3c1332dd84079522e5512da6bd60bf249c70fe1b620022100fd840e3aba63dba22e2a591331f6fe7bfc0d8c43e88f3c3de331dcb7fda69e3d10011a6a0a5b3059301306072a8648ce3d020106082a8648ce3d030107034200040d4c1a081e8db944922b30330558919eb05c412c9879b1cceabbb5a5e9b84743ed8175ce447fb823de1f0e4a2e9b981ca911b0deca61f7b6e676f9fe0d341b211205666972737418ffc7afa0251a6d0a5b3059301306072a8648ce3d020106082a8648ce3d03010703420004fa89ceb4537a7bda7ac4f032e4f7021f667e8a461044bb87edceb8790e281e926440d493f274723c1bd748f8e74d7cdef3662f908714f95bca72ced60e226c8512067365636f6e6418ffc7afa02520011a6a0a5b3059301306072a8648ce3d020106082a8648ce3d03010703420004769a0a83780aa37639699370a28e510b6f77a9eb672b5901e5251ec576cd578449950c3e6b87ad5ccf03a364515aa2acb9d6af8973e932705f5488346372f19d1205746869726418ffc7afa02520d804282a');
INSERT INTO public.ca_journals VALUES (1, '2026-11-23 04:41:06.281821+00', '2026-11-23 04:41:06.281821+00', '\x0aa6030a01411080e2cfaa061ae802308201643082010ba003020102020105300a06082a8648ce3d0403023010310e300c060355040a130566697273743020170d3233313131343232313332305a180f32323836313132303137343633395a3010310e300c060355040a130566697273743059301306072a8648ce3d020106082a8648ce3d0301070342000496dc21f45a8f39fee29f2b028cc69622b445cec2fcd7487a9dc5d647e193e4bd7e6d08013e8c33b07df6fbcd659df0a08b104442dd8ae5139c2bc5a5a44b692ba3543052300e0603551d0f0101ff040403020204300f0603551d130101ff040530030101ff300e0603551d0e040704056669727374301f0603551d110418301686147370696666653a2f2f6578616d706c652e6f7267300a06082a8648ce3d0403020347003044022076e0a5481dd1dc266810d5c45f8d8d8dde9aa94563f2b9c1fbeb75dee3ede69c0220585a868e9ca891c5ff668e9a5a8c5060e4d689b8acad0db69939a905e05b709d280332283030303030303030303030303030303030303030303030303030303030303030303030303030303038ffc7afa025', '0000000000000000000000000000000000000000', '');
INSERT INTO public.ca_journals VALUES (2, '2026-11-23 04:41:06.284348+00', '2026-11-23 04:41:06.284348+00', '\x0aa7030a01411080e2cfaa061ae902308201653082010ba003020102020105300a06082a8648ce3d0403023010310e300c060355040a130566697273743020170d3233313131343232313332305a180f32323836313132303137343633395a3010310e300c060355040a130566697273743059301306072a8648ce3d020106082a8648ce3d030107034200045ea0af4a553f3d50540cfecbcfd6ee41a65e5f8d9288047d013c028c53d1c1cc7c5ea01e45a347c0b294a54066051f0138fe3cd01f07f07228a006bd9de8b8e3a3543052300e0603551d0f0101ff040403020204300f0603551d130101ff040530030101ff300e0603551d0e040704056669727374301f0603551d110418301686147370696666653a2f2f6578616d706c652e6f7267300a06082a8648ce3d0403020348003045022100c6eaeabba2f514e8cbde620b552920ebb3a8cf6f0ebeef59bc6b1bec4fdf4192022068d357f102b63fad8133f035fae863eba7213c076666d21a7d32e02fddea9241280332283030303030303030303030303030303030303030303030303030303030303030303030303030303138ffc7afa025', '0000000000000000000000000000000000000001', '');
INSERT INTO public.ca_journals VALUES (3, '2026-11-23 04:41:06.28753+00', '2026-11-23 04:41:06.28753+00', '\x0aa8030a01411080e2cfaa061aea02308201663082010ba003020102020105300a06082a8648ce3d0403023010310e300c060355040a130566697273743020170d3233313131343232313332305a180f32323836313132303137343633395a3010310e300c060355040a130566697273743059301306072a8648ce3d020106082a8648ce3d03010703420004322b4793d7d61ca728af08c318afe489332dacca9eb773f336c224fb6a886f1c8184df2431e541998cbc02ec737ff9f393875c9b544e785e78bc8794ba6401ffa3543052300e0603551d0f0101ff040403020204300f0603551d130101ff040530030101ff300e0603551d0e040704056669727374301f0603551d110418301686147370696666653a2f2f6578616d706c652e6f7267300a06082a8648ce3d0403020349003046022100ac9b9822f1c22f5ca03ba3228ed65223eb4559135f152778659cb01b83ca5102022100f15ecc44f388cce5a2d8bec9a8c6dc16e893ff994e6b3ef87218e0d917d23206280332283030303030303030303030303030303030303030303030303030303030303030303030303030303238ffc7afa025', '0000000000000000000000000000000000000002', '');
INSERT INTO public.dns_names VALUES (10, '2026-11-23 04:41:06.225816+00', '2026-11-23 04:41:06.225816+00', 2, 'z.example');
INSERT INTO public.dns_names VALUES (11, '2026-11-23 04:41:06.226061+00', '2026-11-23 04:41:06.226061+00', 2, 'a.example');
INSERT INTO public.dns_names VALUES (12, '2026-11-23 04:41:06.228018+00', '2026-11-23 04:41:06.228018+00', 2, 'xn--bcher-kva.example');
INSERT INTO public.federated_registration_entries VALUES (2, 2);
INSERT INTO public.federated_registration_entries VALUES (3, 2);
INSERT INTO public.federated_registration_entries VALUES (4, 2);
INSERT INTO public.federated_trust_domains VALUES (1, '2026-11-23 04:41:06.277937+00', '2026-11-23 04:41:06.277937+00', 'web.test', 'https://127.0.0.1:1/web.test?a=b%20c', 'https_web', '', false);
INSERT INTO public.federated_trust_domains VALUES (2, '2026-11-23 04:41:06.279394+00', '2026-11-23 04:41:06.279394+00', 'spiffe.test', 'https://127.0.0.1:1/spiffe.test?a=b%20c', 'https_spiffe', 'spiffe://spiffe.test/endpoint', false);
INSERT INTO public.join_tokens VALUES (1, '2026-11-23 04:41:06.275293+00', '2026-11-23 04:41:06.275293+00', 'past', 1);
INSERT INTO public.join_tokens VALUES (2, '2026-11-23 04:41:06.277205+00', '2026-11-23 04:41:06.277205+00', 'unused', 9999999999);
INSERT INTO public.migrations VALUES (1, '2026-11-23 04:41:06.106811+00', '2026-11-23 04:41:06.106811+00', 24, '1.14.7');
INSERT INTO public.node_resolver_map_entries VALUES (1, '2026-11-23 04:41:06.232897+00', '2026-11-23 04:41:06.232897+00', 'spiffe://example.org/spire/agent/join_token/a', 'x509pop', 'subject:cn:a');
INSERT INTO public.node_resolver_map_entries VALUES (2, '2026-11-23 04:41:06.233316+00', '2026-11-23 04:41:06.233316+00', 'spiffe://example.org/spire/agent/join_token/a', 'docker', 'label:ünïcode ☃');
INSERT INTO public.node_resolver_map_entries VALUES (3, '2026-11-23 04:41:06.242928+00', '2026-11-23 04:41:06.242928+00', 'spiffe://example.org/spire/agent/x509pop/b', 'x509pop', 'subject:cn:a');
INSERT INTO public.node_resolver_map_entries VALUES (4, '2026-11-23 04:41:06.243182+00', '2026-11-23 04:41:06.243182+00', 'spiffe://example.org/spire/agent/x509pop/b', 'docker', 'label:ünïcode ☃');
INSERT INTO public.node_resolver_map_entries VALUES (5, '2026-11-23 04:41:06.250752+00', '2026-11-23 04:41:06.250752+00', 'spiffe://example.org/spire/agent/banned', 'x509pop', 'subject:cn:a');
INSERT INTO public.node_resolver_map_entries VALUES (6, '2026-11-23 04:41:06.250977+00', '2026-11-23 04:41:06.250977+00', 'spiffe://example.org/spire/agent/banned', 'docker', 'label:ünïcode ☃');
INSERT INTO public.node_resolver_map_entries VALUES (7, '2026-11-23 04:41:06.25492+00', '2026-11-23 04:41:06.25492+00', 'spiffe://example.org/spire/agent/past', 'x509pop', 'subject:cn:a');
INSERT INTO public.node_resolver_map_entries VALUES (8, '2026-11-23 04:41:06.255128+00', '2026-11-23 04:41:06.255128+00', 'spiffe://example.org/spire/agent/past', 'docker', 'label:ünïcode ☃');
INSERT INTO public.node_resolver_map_entries VALUES (9, '2026-11-23 04:41:06.259285+00', '2026-11-23 04:41:06.259285+00', 'spiffe://example.org/spire/agent/old', 'x509pop', 'subject:cn:a');
INSERT INTO public.node_resolver_map_entries VALUES (10, '2026-11-23 04:41:06.259584+00', '2026-11-23 04:41:06.259584+00', 'spiffe://example.org/spire/agent/old', 'docker', 'label:ünïcode ☃');
INSERT INTO public.registered_entries VALUES (1, '2026-11-23 04:41:06.154942+00', '2026-11-23 04:41:06.154942+00', 'least', 'spiffe://example.org/least', 'spiffe://example.org/node', 0, false, false, 0, 0, false, '', 0);
INSERT INTO public.registered_entries VALUES (3, '2026-11-23 04:41:06.171391+00', '2026-11-23 04:41:06.171391+00', 'stored', 'spiffe://example.org/stored', 'spiffe://example.org/node', 0, false, false, 0, 0, true, '', 0);
INSERT INTO public.registered_entries VALUES (4, '2026-11-23 04:41:06.179669+00', '2026-11-23 04:41:06.179669+00', 'eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee', 'spiffe://example.org/llllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllllll', 'spiffe://example.org/node', 0, false, false, 0, 0, false, '', 0);
INSERT INTO public.registered_entries VALUES (5, '2026-11-23 04:41:06.183103+00', '2026-11-23 04:41:06.183103+00', 'alias', 'spiffe://example.org/node', 'spiffe://example.org/spire/server', 0, false, false, 0, 0, false, '', 0);
INSERT INTO public.registered_entries VALUES (2, '2026-11-23 04:41:06.163574+00', '2026-11-23 04:41:06.223122+00', 'full', 'spiffe://example.org/full', 'spiffe://example.org/spire/agent/join_token/a', 2147483647, true, true, 9999999999, 3, false, 'hint: ☃ ''quoted''', 2147483647);
INSERT INTO public.registered_entries VALUES (7, '2026-11-23 04:41:06.198846+00', '2026-11-23 04:41:06.198846+00', 'old', 'spiffe://example.org/old', 'spiffe://example.org/node', 0, false, false, 0, NULL, NULL, NULL, NULL);
INSERT INTO public.registered_entries_events VALUES (1, '2026-11-23 04:41:06.159454+00', '2026-11-23 04:41:06.159454+00', 'least');
INSERT INTO public.registered_entries_events VALUES (2, '2026-11-23 04:41:06.167686+00', '2026-11-23 04:41:06.167686+00', 'full');
INSERT INTO public.registered_entries_events VALUES (3, '2026-11-23 04:41:06.172884+00', '2026-11-23 04:41:06.172884+00', 'stored');
INSERT INTO public.registered_entries_events VALUES (4, '2026-11-23 04:41:06.181335+00', '2026-11-23 04:41:06.181335+00', 'eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee');
INSERT INTO public.registered_entries_events VALUES (5, '2026-11-23 04:41:06.187824+00', '2026-11-23 04:41:06.187824+00', 'alias');
INSERT INTO public.registered_entries_events VALUES (6, '2026-11-23 04:41:06.192795+00', '2026-11-23 04:41:06.192795+00', 'deleted');
INSERT INTO public.registered_entries_events VALUES (7, '2026-11-23 04:41:06.200617+00', '2026-11-23 04:41:06.200617+00', 'old');
INSERT INTO public.registered_entries_events VALUES (8, '2026-11-23 04:41:06.204314+00', '2026-11-23 04:41:06.204314+00', 'deleted');
INSERT INTO public.registered_entries_events VALUES (9, '2026-11-23 04:41:06.212342+00', '2026-11-23 04:41:06.212342+00', 'full');
INSERT INTO public.registered_entries_events VALUES (10, '2026-11-23 04:41:06.221439+00', '2026-11-23 04:41:06.221439+00', 'full');
INSERT INTO public.registered_entries_events VALUES (11, '2026-11-23 04:41:06.230482+00', '2026-11-23 04:41:06.230482+00', 'full');
INSERT INTO public.selectors VALUES (1, '2026-11-23 04:41:06.155707+00', '2026-11-23 04:41:06.155707+00', 1, 'unix', 'uid:0');
INSERT INTO public.selectors VALUES (6, '2026-11-23 04:41:06.171892+00', '2026-11-23 04:41:06.171892+00', 3, 'aws_secretsmanager', 'secretname:s');
INSERT INTO public.selectors VALUES (7, '2026-11-23 04:41:06.180414+00', '2026-11-23 04:41:06.180414+00', 4, 'unix', 'path:/ppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppppp');
INSERT INTO public.selectors VALUES (8, '2026-11-23 04:41:06.18696+00', '2026-11-23 04:41:06.18696+00', 5, 'x509pop', 'subject:cn:a');
INSERT INTO public.selectors VALUES (10, '2026-11-23 04:41:06.199679+00', '2026-11-23 04:41:06.199679+00', 7, 'unix', 'uid:1');
INSERT INTO public.selectors VALUES (19, '2026-11-23 04:41:06.224781+00', '2026-11-23 04:41:06.224781+00', 2, 'unix', 'uid:2147483648');
INSERT INTO public.selectors VALUES (20, '2026-11-23 04:41:06.225052+00', '2026-11-23 04:41:06.225052+00', 2, 'k8s', 'pod-label:a/b:c:d');
INSERT INTO public.selectors VALUES (21, '2026-11-23 04:41:06.225303+00', '2026-11-23 04:41:06.225303+00', 2, 'docker', 'env:A="q" ''p'' \ % _ ; -- 	');
INSERT INTO public.selectors VALUES (22, '2026-11-23 04:41:06.225559+00', '2026-11-23 04:41:06.225559+00', 2, 'docker', 'label:ünïcode ☃');
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
