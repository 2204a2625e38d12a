// A small web application with a dependency and no Procfile: `npm start` is the default.
const http = require("http");
const ms = require("ms");

const started = Date.now();
http
  .createServer((request, response) => {
    response.setHeader("Content-Type", "text/plain; charset=utf-8");
    response.end(`Hello from Node, up for ${ms(Date.now() - started)}\n`);
  })
  .listen(process.env.PORT, () => console.log(`listening on ${process.env.PORT}`));
