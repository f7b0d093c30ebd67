//! The registration service. The kubelet finds its socket in `plugins_registry`, requests the driver's name and socket, and reports whether
//! it has registered the driver.

use std::sync::Arc;

use agent_runtime::{telemetry::hush::LogLimiter, text};
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};
use tonic::{Request, Response, Status};
use tracing::{error, info};

use crate::{
    csi::proto::pluginregistration::{
        InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse, registration_server::Registration,
    },
    per_pod::PerPod,
};

/// The log target of this module.
const LOG_TARGET: &str = "sds_agent::csi::registration";

/// The plugin type of CSI drivers.
const TYPE: &str = "CSIPlugin";
/// The version of the Container Storage Interface.
const INTERFACE: &str = "1.0.0";

/// Implements the kubelet's plugin registration service.
#[derive(Debug, Clone)]
pub struct Registrar {
    /// `sockets.perPod`
    pub config: Arc<PerPod>,
    /// Notified when the kubelet refuses the driver. The server then binds the socket again, because the kubelet does not retry by itself.
    pub refused: Arc<Notify>,
    /// Whether the kubelet has registered the driver.
    pub registered: watch::Sender<bool>,
    lines: Arc<LogLimiter<&'static str>>,
}

impl Registrar {
    /// Registers the driver of `config`.
    pub fn new(config: Arc<PerPod>, refused: Arc<Notify>, registered: watch::Sender<bool>) -> Self {
        Self { config, refused, registered, lines: Arc::default() }
    }
}

#[tonic::async_trait]
impl Registration for Registrar {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: TYPE.to_owned(),
            name: self.config.driver_name.clone(),
            endpoint: self.config.driver_socket().to_string_lossy().into_owned(),
            supported_versions: vec![INTERFACE.to_owned()],
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let RegistrationStatus { plugin_registered, error } = request.into_inner();
        let driver = &self.config.driver_name;
        self.registered.send_replace(plugin_registered);
        if !plugin_registered {
            self.refused.notify_one();
        }
        let outcome = if plugin_registered { "registered" } else { "refused" };
        match self.lines.permit(outcome, Instant::now()) {
            Some(left_out) if plugin_registered => {
                info!(target: LOG_TARGET, %driver, left_out, "the kubelet has registered the CSI driver");
            }
            Some(left_out) => {
                let cause = text::excerpt(&error, text::MAX_MESSAGE_CHARS);
                error!(
                    target: LOG_TARGET, %driver,
                    %cause,
                    left_out,
                    "the kubelet does not register the CSI driver; it will be offered again"
                );
            }
            None => {}
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}
