// The logs of the parts: one file for each in the directory.

package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"k8s.io/klog/v2"
	"k8s.io/klog/v2/textlogger"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"
)

// setUpLogs sends all logs that use klog's globals, which are mostly the API server's,
// to kube-apiserver.log. A fatal log line becomes a failure of the process.
func setUpLogs(dir string, verbosity int, fail func(error)) error {
	logger, err := openLog(dir, "kube-apiserver", verbosity)
	if err != nil {
		return err
	}
	fs := flag.NewFlagSet("klog", flag.ContinueOnError)
	klog.InitFlags(fs)
	if err := fs.Set("v", strconv.Itoa(verbosity)); err != nil {
		return fmt.Errorf("cannot set the verbosity: %w", err)
	}
	klog.EnableContextualLogging(true)
	klog.SetLoggerWithOptions(logger, klog.ContextualLogger(true))
	klog.OsExit = func(code int) {
		fail(fmt.Errorf("a part ended with exit code %d; its log is %s", code, filepath.Join(dir, "kube-apiserver.log")))
		select {}
	}
	ctrllog.SetLogger(logger)
	return nil
}

// openLog returns a logger that appends to DIR/NAME.log.
func openLog(dir, name string, verbosity int) (klog.Logger, error) {
	path := filepath.Join(dir, name+".log")
	file, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return klog.Logger{}, fmt.Errorf("cannot open a log: %w", err)
	}
	return textlogger.NewLogger(textlogger.NewConfig(textlogger.Verbosity(verbosity), textlogger.Output(file))), nil
}
