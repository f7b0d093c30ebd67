//! The agent as a child process, with each of its subcommands, on a free socket and free ports.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitStatus,
    sync::LazyLock,
    time::Duration,
};

use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::process::Command;

use crate::{child::Child, eventually, free_port, http, paths};

/// Limit from start to ready, on a busy machine.
const START: Duration = Duration::from_secs(240);

/// The tests ask for readiness at the admin address.
const PROBES: &str = "probes: { address: \"127.0.0.1:0\" }\n";

/// The program under test.
pub fn program() -> &'static Path {
    static PROGRAM: LazyLock<PathBuf> = LazyLock::new(|| paths::program("sds-agent"));
    &PROGRAM
}

/// How to start an agent. Starting the same value twice restarts the agent on the same socket.
#[derive(Debug, Clone)]
pub struct Launch {
    wrapper: Vec<String>,
    program: PathBuf,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    socket: PathBuf,
    admin: SocketAddr,
}

impl Launch {
    /// `sds-agent dev` with its socket in `dir`.
    pub fn dev(dir: &Path) -> Self {
        let (socket, admin) = (dir.join("sds.sock"), loopback());
        let arguments = ["dev", "--socket", text(&socket), "--admin", &admin.to_string()].map(str::to_owned).to_vec();
        Self { wrapper: Vec::new(), program: program().to_owned(), arguments, environment: Vec::new(), socket, admin }
    }

    /// `sds-agent run` with its configuration and socket in `dir`. `settings` is YAML without sockets and addresses, which are added.
    pub fn run(dir: &Path, settings: &str) -> Self {
        let shared = format!("{{ shared: {{ path: {}, mode: \"0666\" }} }}", dir.join("sds.sock").display());
        Self::run_on(dir, &shared, settings)
    }

    /// Like [`Launch::run`], with `sockets` as given.
    pub fn run_on(dir: &Path, sockets: &str, settings: &str) -> Self {
        let (socket, admin, metrics) = (dir.join("sds.sock"), loopback(), loopback());
        let config = dir.join("config.yaml");
        let yaml = format!(
            "sockets: {sockets}\nadmin: {{ address: {admin} }}\nmetrics: {{ address: {metrics}, perWorkload: true }}\n{PROBES}{settings}"
        );
        fs::write(&config, yaml).expect("the configuration is written");
        let arguments = ["run", "--config", text(&config)].map(str::to_owned).to_vec();
        Self { wrapper: Vec::new(), program: program().to_owned(), arguments, environment: Vec::new(), socket, admin }
    }

    /// Replaces `metrics.address`.
    pub fn metrics_on(self, address: &str) -> Self {
        let config = self.arguments.last().expect("the configuration");
        let yaml = fs::read_to_string(config).expect("the configuration");
        let (before, after) = yaml.split_once("metrics: { address: ").expect("an address");
        let (_, after) = after.split_once(',').expect("more than an address");
        fs::write(config, format!("{before}metrics: {{ address: \"{address}\",{after}")).expect("the configuration is written");
        self
    }

    /// The mount helper of this agent, which reads the same configuration. Metrics and readiness are at its address for metrics.
    pub fn mount_helper(&self) -> Self {
        let config = self.arguments.last().expect("the configuration");
        let metrics = loopback();
        let yaml = fs::read_to_string(config).expect("the configuration");
        let addresses = format!("mountHelper: {{ metricsAddress: {metrics}, probesAddress: \"127.0.0.1:0\" }}\n");
        fs::write(config, format!("{yaml}{addresses}")).expect("the configuration is written");
        let mut launch = Self { wrapper: Vec::new(), admin: metrics, ..self.clone() };
        "mount-helper".clone_into(&mut launch.arguments[0]);
        launch
    }

    /// `sds-agent approver` with its configuration in `dir`. `settings` is YAML without addresses, which are added.
    pub fn approver(dir: &Path, settings: &str) -> Self {
        let mut launch = Self::run_on(dir, "{}", settings);
        "approver".clone_into(&mut launch.arguments[0]);
        launch
    }

    /// `sds-agent approver` that reads this ConfigMap, which must have the returned lines in its configuration.
    pub fn approver_of_config_map(dir: &Path, name: &str) -> (Self, String) {
        let (socket, admin, metrics) = (dir.join("sds.sock"), loopback(), loopback());
        let arguments = ["approver", "--config-map", name].map(str::to_owned).to_vec();
        let launch = Self { wrapper: Vec::new(), program: program().to_owned(), arguments, environment: Vec::new(), socket, admin };
        (launch, format!("admin: {{ address: {admin} }}\nmetrics: {{ address: {metrics} }}\n{PROBES}"))
    }

    /// `--lifetime`, for `dev`.
    pub fn lifetime(mut self, lifetime: &str) -> Self {
        self.arguments.extend(["--lifetime".to_owned(), lifetime.to_owned()]);
        self
    }

    /// An environment variable.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Starts the agent through another program, such as `strace`.
    pub fn under<S: Into<String>>(mut self, wrapper: impl IntoIterator<Item = S>) -> Self {
        self.wrapper.extend(wrapper.into_iter().map(Into::into));
        self
    }

    /// Starts a copy of the program at this path, or the previous version, whose configuration has no `probes`.
    pub fn program(mut self, program: &Path) -> Self {
        program.clone_into(&mut self.program);
        if program.ends_with("former/sds-agent") {
            let config = self.arguments.last().expect("the configuration");
            let yaml = fs::read_to_string(config).expect("the configuration");
            fs::write(config, yaml.replace(PROBES, "")).expect("the configuration is written");
        }
        self
    }

    /// `doctor` with the same configuration and environment; `arguments` name its subject.
    pub fn doctor(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        let config = self.arguments.iter().skip_while(|argument| *argument != "--config").take(2);
        command.arg("doctor").args(config).args(["-o", "json"]).args(arguments).env_remove("KUBECONFIG");
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// The path of the workload socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Starts the agent without waiting for anything.
    pub fn spawn(&self) -> Agent {
        let mut words = self.wrapper.iter().map(String::as_str).chain([text(&self.program)]);
        let mut command = Command::new(words.next().expect("the program at least"));
        command.args(words).args(&self.arguments);
        // Settings of the user who runs the tests must not affect the agent.
        command.env_remove("KUBECONFIG").env_remove("SDS_AGENT_LOG");
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        Agent { child: Child::spawn("sds-agent", &mut command), socket: self.socket.clone(), admin: self.admin }
    }

    /// Starts the agent and waits until it is ready.
    pub async fn start(&self) -> Agent {
        let mut agent = self.spawn();
        agent.ready().await;
        agent
    }
}

/// A running agent. Killed when dropped.
pub struct Agent {
    child: Child,
    socket: PathBuf,
    admin: SocketAddr,
}

impl Agent {
    /// Waits for `/readyz`. Panics at once if the agent ends before.
    pub async fn ready(&mut self) {
        let (admin, child) = (self.admin, &mut self.child);
        eventually("the agent is ready", START, async || {
            if let Some(status) = child.ended() {
                panic!("the agent ended before it was ready: {status}");
            }
            http::get_ok(admin, "/readyz").await
        })
        .await;
    }

    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its admin address.
    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// Its process.
    pub fn process(&self) -> &Child {
        &self.child
    }

    /// The value of a metric, summed over its labels; zero before the first count.
    pub async fn metric(&self, name: &str) -> f64 {
        self.metric_of(name, &[]).await
    }

    /// The value of the series that have all of `labels`, such as `result="ok"`, summed.
    pub async fn metric_of(&self, name: &str, labels: &[&str]) -> f64 {
        let text = http::get_ok(self.admin, "/metrics").await.expect("the agent's metrics");
        let values = text.lines().filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])));
        let values = values.filter(|line| labels.iter().all(|label| line.contains(label)));
        values.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
    }

    /// Waits until such a metric is at least `least`, and returns it. Other processes can see a write before the agent has counted it.
    pub async fn counted(&self, name: &str, labels: &[&str], least: f64) -> f64 {
        eventually(&format!("{name} is {least}"), START, async || {
            let value = self.metric_of(name, labels).await;
            if value > least - 0.5 { Ok(value) } else { Err(value.to_string()) }
        })
        .await
    }

    /// Waits until the output contains these words `times` times: the agent writes its log asynchronously.
    pub async fn wrote(&self, words: &str, times: usize) -> String {
        eventually(&format!("the agent writes {words:?} {times} times"), START, async || {
            let output = self.child.output();
            if output.matches(words).count() >= times { Ok(output) } else { Err(output) }
        })
        .await
    }

    /// The response to a POST on the admin address.
    pub async fn post(&self, path: &str) -> http::Response {
        http::post(self.admin, path).await.expect("the agent answers")
    }

    /// The detailed readiness page.
    pub async fn readiness(&self) -> Result<String, String> {
        http::get_ok(self.admin, "/readyz?verbose").await
    }

    /// The certificates that `/certs` lists.
    pub async fn certificates(&self) -> Vec<Value> {
        let text = http::get_ok(self.admin, "/certs").await.expect("the agent's certificates");
        let answer: Value = serde_json::from_str(&text).expect("JSON");
        answer["certificates"].as_array().expect("a list").clone()
    }

    /// The row of `/certs` for a SPIFFE ID.
    pub async fn certificate(&self, id: &str) -> Option<Value> {
        self.certificates().await.into_iter().find(|row| row["spiffe_id"] == id)
    }

    /// The lines of the log so far, each a JSON object.
    pub fn log(&self) -> Vec<Value> {
        lines(&self.child.stderr().text().lines().map(str::to_owned).collect::<Vec<_>>())
    }

    /// Waits for a line of the log that matches `is_it`.
    pub async fn logs(&self, what: &str, limit: Duration, is_it: impl Fn(&Value) -> bool) -> Value {
        self.child.stderr().until(what, limit, |text| lines(text).into_iter().find(&is_it)).await
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) {
        self.child.signal(Signal::SIGTERM);
    }

    /// Sends SIGKILL and waits for the end.
    pub async fn kill(mut self) {
        self.child.signal(Signal::SIGKILL);
        self.child.exit(Duration::from_secs(10)).await;
    }

    /// Whether the process has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.ended().is_some()
    }

    /// Waits for the end of the process.
    pub async fn exit(&mut self, limit: Duration) -> ExitStatus {
        self.child.exit(limit).await
    }
}

fn lines(text: &[String]) -> Vec<Value> {
    text.iter().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], free_port()))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary folders have plain names")
}
