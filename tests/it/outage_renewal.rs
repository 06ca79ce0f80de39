//! Agents' own SVIDs in an outage of the database, with several servers: they are renewed, let in everywhere, and stored
//! afterwards, where a real SPIRE server finds them.

use testkit::{Agent, AgentOptions, Database, Flavor, Proxy, Server, ServerOptions, Weather, eventually};

/// An agent renews its own SVID every eight seconds or so.
const TIMES: &str = r#"agent_ttl = "16s"
    default_x509_svid_ttl = "12s""#;

fn options(database: &Database, port: u16) -> ServerOptions {
    let datastore = Some(testkit::datastore(database, port));
    ServerOptions { datastore, server: TIMES.into(), ..Default::default() }
}

/// The agent's serial numbers as the database has them.
fn stored(database: &Database) -> String {
    database.sql("select serial_number, new_serial_number from attested_node_entries")
}

/// The serial number of the newest SVID that this server signed for an agent.
fn newest(server: &Server) -> String {
    let log = server.process.log();
    let signed = log.lines().rev().find(|line| line.contains("purpose=Agent")).expect("there is one");
    let (_, number) = signed.split_once("serial_num=").expect("its number is told");
    number.split(' ').next().expect("a word").to_owned()
}

/// How often this server renewed an agent's SVID on its own.
fn without_datastore(server: &Server) -> usize {
    server.process.log().matches("SVID is renewed without").count()
}

/// An agent behind a balancer.
struct Rig {
    agent: Agent,
    balancer: Proxy,
    asked: u32,
}

impl Rig {
    fn renewals(&self) -> usize {
        self.agent.process.log().matches("Successfully rotated agent SVID").count()
    }

    /// Leads the agent to these servers alone and has it ask one of them for something new.
    fn asks(&mut self, ports: &[u16]) {
        self.balancer.set_targets(ports);
        self.balancer.cut(None);
        self.asked += 1;
        let audience = format!("audience-{}", self.asked);
        eventually("the agent is let in", || {
            assert!(self.agent.process.ended().is_none(), "the agent ended:\n{}", self.agent.process.log());
            let out = self.agent.command(&["api", "fetch", "jwt", "-audience", &audience]);
            if out.code == 0 { Ok(()) } else { Err(format!("{out:?}\n{}", self.agent.process.log())) }
        });
    }

    /// Waits for one more renewal of the agent's own SVID, and for `told` to count one more.
    fn renews(&mut self, told: impl Fn(&Self) -> usize) {
        let (renewals, before) = (self.renewals(), told(self));
        eventually("the agent renews its own SVID", || {
            assert!(self.agent.process.ended().is_none(), "the agent ended:\n{}", self.agent.process.log());
            match (self.renewals() - renewals, told(self) - before) {
                (1.., 1..) => Ok(()),
                counts => Err(format!("{counts:?}\n{}", self.agent.process.log())),
            }
        });
    }
}

#[test]
fn an_agent_lives_through_an_outage_at_two_servers_and_is_known_to_spire_afterwards() {
    let Some(database) = testkit::postgres() else { return };
    let proxy = Proxy::to(database.port());
    let [one, two] = [(); 2].map(|()| Server::start(Flavor::Finial, &options(&database, proxy.port())));
    // The real one is there from the beginning, so that the agent trusts it; nobody is led to it.
    let spire = Server::start(Flavor::Spire, &options(&database, database.port()));
    for server in [&one, &two] {
        eventually("all authorities are known", || {
            let bundle = server.command(&["bundle", "show"]).ok().stdout;
            if bundle.matches("BEGIN CERTIFICATE").count() == 3 { Ok(()) } else { Err(bundle) }
        });
    }
    let id = one.entry("/workload", &[]);
    let balancer = Proxy::balancing(&[one.port, two.port]);
    let by_balancer = AgentOptions { server_port: Some(balancer.port()), ..Default::default() };
    let agent = Agent::serving(Flavor::Finial, &one, &by_balancer);
    let mut rig = Rig { agent, balancer, asked: 0 };

    proxy.weather(Weather::Refusing);
    proxy.cut(None);
    let before = stored(&database);
    // Renewed at one, used at the other, renewed there on top of that, and back.
    for (here, there) in [(&one, &two), (&two, &one)] {
        for server in [here, there] {
            rig.asks(&[server.port]);
            rig.renews(|_| without_datastore(server));
        }
    }
    assert_eq!(stored(&database), before, "the database was away all the time");
    assert!(rig.agent.command(&["api", "fetch", "x509"]).ok().stdout.contains(&id));

    proxy.weather(Weather::Fair);
    // At both is known a part of what was given out, and either may be the first to store its part.
    eventually("what was renewed last is stored", || match stored(&database) {
        stored if stored.contains(&newest(&one)) => Ok(()),
        stored => Err(format!("{stored}{}{}", one.process.log(), two.process.log())),
    });
    for server in [&one, &two] {
        eventually("every server is well", || {
            let log = server.process.log();
            if log.contains("The datastore answers again") { Ok(()) } else { Err(log) }
        });
    }
    rig.asks(&[spire.port]);
    // And goes on there, and here.
    rig.renews(Rig::renewals);
    rig.asks(&[spire.port]);
    rig.asks(&[one.port]);
    let log = rig.agent.process.log();
    assert_eq!(log.matches("Node attestation was successful").count(), 1, "{log}");
    for server in [&one, &two, &spire] {
        let log = server.process.log();
        assert!(!log.contains("Agent SVID is not active"), "{log}");
    }
}
