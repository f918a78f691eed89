// Browsers refuse to start a Worker from a file:// address, and the search of the theme runs in one. There, this class
// takes its place: the script of the worker runs in a hidden frame, and messages are passed as events.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.waiting = [];
      document.body.appendChild(this.frame);
      const inner = this.frame.contentWindow;
      inner.__worker = this;
      inner.document.open();
      inner.document.write(
        "<script>" +
          "self.postMessage = data => { const event = new parent.MessageEvent('message', { data });" +
          " __worker.dispatchEvent(event); if (__worker.onmessage) __worker.onmessage(event) };" +
          "self.importScripts = (...urls) => Promise.all(urls.map(url => new Promise((resolve, reject) => {" +
          " const script = document.createElement('script'); script.src = new URL(url, '" + url + "').href;" +
          " script.onload = resolve; script.onerror = reject; document.body.appendChild(script) })));" +
          "</" + "script><body><script src='" + url + "' onload='__worker.start()'></" + "script>"
      );
      inner.document.close();
    }
    start() {
      this.started = true;
      this.waiting.splice(0).forEach(data => this.postMessage(data));
    }
    postMessage(data) {
      if (!this.started) return void this.waiting.push(data);
      this.frame.contentWindow.dispatchEvent(new this.frame.contentWindow.MessageEvent("message", { data }));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
